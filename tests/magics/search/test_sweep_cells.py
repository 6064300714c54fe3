"""What a cell of a sweep sends, and how its Stop ends it: a server that is played, the signal of a real Stop."""

from __future__ import annotations

import base64
import os
import pickle
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.magics.search import sweeps
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import Cell
from jupyter_llmcloud.server import cli
from tests.magics.search.test_view import told

CELL = Cell("x = 1", "%%sweep\nx = 1", 1, "<cell>", 4)


class PlayedServer:
    """Answers as a server with one sweep; `presses` Stop while it is first waited for."""

    def __init__(self, presses: bool = False, ends: str = "finished") -> None:
        self._presses = presses
        self._ends = ends
        self.started: list[dict[str, Any]] = []
        self.num_stops = 0

    def start_sweep(self, **body: Any) -> dict[str, Any]:
        self.started.append(body)
        return told() if body.get("resume") else told(trials=[])

    def stop_sweep(self, name: str) -> dict[str, Any]:
        self.num_stops, self._ends = self.num_stops + 1, "stopped"
        return told()

    def sweep(self, name: str, seen: int | None = None, wait_s: float = 0) -> dict[str, Any]:
        if seen is None:
            return told()
        if self._presses:
            self._presses = False
            os.kill(os.getpid(), signal.SIGINT)
            return told()
        return told(state=self._ends)


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Those of a program that a shell has started in the background are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def shell() -> Any:
    return SimpleNamespace(user_ns={"width": 4, "words": object}, input_transformer_manager=None)


def play(monkeypatch: pytest.MonkeyPatch, **options: Any) -> PlayedServer:
    server = PlayedServer(**options)
    monkeypatch.setattr(session, "current", lambda: SimpleNamespace(server=server, cluster=None))
    monkeypatch.setattr(sweeps.cells, "check_syntax", lambda *_: None)
    monkeypatch.setattr(discovery, "find_running", lambda: server)
    return server


def test_a_cell_sends_what_was_written_also_what_is_a_default(
    monkeypatch: pytest.MonkeyPatch, shell: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = play(monkeypatch)
    given = {"name": "tuned", "resume": True, "direction": "minimize", "nproc": None, "push": ["width", "words"]}
    sweeps.start(shell, CELL, {**given, "background": True})
    (body,) = server.started
    cell, pushed = body.pop("cell"), pickle.loads(base64.b64decode(body.pop("pushed")))
    assert body == {"source": CELL.source, "name": "tuned", "resume": True, "direction": "minimize"}
    assert pushed["width"] == 4 and cell["pushed"] == {"width": "4", "words": ""} and cell["line_offset"] == 1
    assert "goes on by itself: %sweeps attach tuned shows it." in capsys.readouterr().out


def test_stop_ends_the_sweep_and_says_how_it_is_gone_on_with(monkeypatch: pytest.MonkeyPatch, shell: Any) -> None:
    server = play(monkeypatch, presses=True)
    with pytest.raises(KeyboardInterrupt, match="what is done is kept: %sweeps resume tuned goes on"):
        sweeps.start(shell, CELL, {})
    assert server.num_stops == 1


def test_the_command_runs_a_script_and_tells_of_the_best(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = play(monkeypatch)
    script = tmp_path / "tune.py"
    script.write_text("trial")
    assert cli.main(["sweep", str(script), "-n", "2", "--metric", "loss", "--sampler", "tpe"]) == 0
    (body,) = server.started
    assert (body["source"], body["cell"]["filename"]) == ("trial", str(script)) and body["sampler"] == "tpe"
    said = capsys.readouterr()
    assert "best   0.25" in said.out and "trial 3  failed" in said.err


def test_the_command_is_stopped_by_ctrl_c_and_says_how_it_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = play(monkeypatch, presses=True)
    assert cli.main(["sweep", "--name", "tuned", "--resume"]) == 130
    assert server.num_stops == 1 and "jupyter llmcloud sweep --name tuned --resume goes on" in capsys.readouterr().out
    assert cli.main(["sweep"]) != 0 and "which script?" in capsys.readouterr().err
