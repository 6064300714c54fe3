"""What a run looks like in a terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from jupyter_llmcloud.client import terminal as module
from jupyter_llmcloud.client.follow_run import exit_status
from jupyter_llmcloud.client.terminal import TerminalOutput
from jupyter_llmcloud.core.metrics.series import MetricCollector
from jupyter_llmcloud.core.output.progress_line import progress_line
from jupyter_llmcloud.storage.runs import RunRecord

NOW = 1_000.0


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "time", lambda: NOW)


def shown(is_terminal: bool = False) -> tuple[TerminalOutput, Screen, Screen]:
    out, err = Screen(is_terminal), Screen(is_terminal)
    return TerminalOutput("long", [0, 1], NOW - 10, out, err), out, err


def line(text: str, seq: int = 1, kind: str = "stdout") -> dict[str, Any]:
    return {"seq": seq, "t": NOW - 5, "kind": kind, "text": text}


def test_the_same_line_of_all_ranks_is_one_and_others_are_labelled() -> None:
    terminal, out, err = shown()
    terminal.logs([(0, line("alike\n")), (1, line("alike\n")), (1, line("other\n", 2))])
    terminal.finish("finished", [])
    assert out.getvalue() == "[0-1] alike\n[1] other\n"
    assert err.getvalue() == ""


def test_what_ranks_write_to_stderr_goes_there() -> None:
    terminal, out, err = shown()
    terminal.logs([(0, line("oh\n", kind="stderr"))])
    terminal.finish("finished", [])
    assert (out.getvalue(), err.getvalue()) == ("", "[0] oh\n")


def test_a_pipe_gets_no_line_of_progress() -> None:
    terminal, _, err = shown(is_terminal=False)
    terminal.metrics(0, [{"seq": 1, "t": NOW - 1, "progress": [3, 10]}])
    terminal.tick()
    assert err.getvalue() == ""


def test_the_line_of_progress_makes_way_for_output() -> None:
    terminal, out, err = shown(is_terminal=True)
    terminal.metrics(0, [{"seq": 1, "t": NOW - 1, "progress": [3, 10]}])
    terminal.tick()
    assert "30 %" in err.getvalue()
    terminal.logs([(0, line("text\n"))])
    terminal.finish("finished", [])
    assert err.getvalue().endswith("\r\x1b[K")
    assert out.getvalue() == "[0] text\n"


def test_a_failed_run_ends_with_the_traceback_of_the_rank_that_failed_first() -> None:
    terminal, _, err = shown()
    error = {
        "rank": 1,
        "ename": "ValueError",
        "traceback": ["\x1b[31mTraceback", "ValueError: no"],
        "place": "train.py:3",
    }
    terminal.finish("failed", [error])
    assert err.getvalue() == "Traceback\nValueError: no\nrank 1 failed at train.py:3.\n"


def test_a_script_that_left_by_itself_has_no_traceback() -> None:
    terminal, _, err = shown()
    terminal.finish("failed", [{"rank": 0, "ename": "SystemExit", "traceback": ["SystemExit: 2"]}])
    assert err.getvalue() == ""


def test_a_script_that_left_with_a_reason_says_it_as_python_does() -> None:
    for evalue, said in (("no data in ./in", "no data in ./in\n"), ("2", ""), ("-1", "")):
        terminal, _, err = shown()
        terminal.finish("failed", [{"rank": 0, "ename": "SystemExit", "evalue": evalue, "traceback": []}])
        assert err.getvalue() == said


def test_the_line_says_how_far_a_run_is_and_how_long_it_takes_yet() -> None:
    metrics = MetricCollector()
    metrics.feed(0, [{"seq": number, "t": float(number), "progress": [10 * number, 100]} for number in range(1, 6)])
    metrics.feed(0, [{"seq": 9, "t": 5.0, "step": 4, "values": {"loss": 0.5}}])
    text = progress_line("long", "running", metrics, 5.0, 5.0, 120)
    assert re.fullmatch(r"long  ━{10}─{10}  50 %  50/100  10/s  ETA 5.0 s  loss 0.5", text)
    assert progress_line("long", "stopping", metrics, 5.0, 5.0, 20) == text.replace("long", "long  stopping")[:19] + "…"


def test_the_line_says_what_a_run_costs_where_a_price_is_known() -> None:
    metrics = MetricCollector()
    metrics.feed(0, [{"seq": number, "t": float(number), "progress": [number, 100]} for number in range(1, 51)])
    text = progress_line("long", "running", metrics, 50.0, 50.0, 200, (36.0, 100.0, 2))
    assert re.search(r"  cost 1\.00 so far, about 2\.00 in the end \(1\.\d\d to 2\.\d\d\)$", text)
    quiet = progress_line("long", "running", MetricCollector(), 72.0, 5.0, 80, (36.0, 100.0, 2))
    assert quiet == "long  1 min 12 s  cost 1.00 so far"


def test_without_progress_the_line_says_for_how_long_it_runs() -> None:
    assert progress_line("long", "running", MetricCollector(), 72.0, 5.0, 80) == "long  1 min 12 s"


@pytest.mark.parametrize(
    ("state", "error", "status"),
    [
        ("finished", None, 0),
        ("stopped", None, 130),
        ("lost", None, 1),
        ("failed", {"ename": "ValueError", "evalue": "3"}, 1),
        ("failed", {"ename": "SystemExit", "evalue": "3"}, 3),
        ("failed", {"ename": "SystemExit", "evalue": "the reason"}, 1),
        ("failed", {"ename": "SystemExit", "evalue": "256"}, 1),
        ("failed", {"ename": "SystemExit", "evalue": "-1"}, 255),
    ],
)
def test_the_exit_status_says_how_a_run_ended(state: str, error: dict[str, str] | None, status: int) -> None:
    record = RunRecord("long-1", "long", state, errors=[error] if error else [])
    assert exit_status(state, record) == status


def test_a_loss_that_is_nan_is_said_in_the_line_and_at_the_end() -> None:
    terminal, _, _ = shown(is_terminal=True)
    for rank in (0, 1):
        values = [1.0, 1.0, float("nan")]
        records = [{"seq": n + 1, "t": NOW, "step": n, "values": {"loss": value}} for n, value in enumerate(values)]
        terminal.metrics(rank, records)
    assert terminal.alarms == ["loss is NaN since step 2"]
    assert progress_line("long", "running", terminal._metrics, 72.0, 5.0, 80) == "long  1 min 12 s  loss NaN"


def test_a_long_line_behind_a_bar_is_whole() -> None:
    terminal, out, _ = shown()
    terminal.logs([(0, line(f"\r50%\r100%\n{'A' * 50_000}\nnext\n"))])
    terminal.finish("finished", [])
    assert out.getvalue().splitlines() == ["[0] 100%", f"[0] {'A' * 50_000}", "[0] next"]


def test_what_the_encoding_of_the_terminal_has_not_is_written_as_python_writes_it_elsewhere() -> None:
    data = io.BytesIO()
    out = io.TextIOWrapper(data, encoding="ascii")
    terminal = TerminalOutput("long", [0, 1], NOW - 10, out, Screen(False))
    terminal.logs([(0, line("gr\xfc\xdfe \udcff\n"))])
    terminal.finish("finished", [])
    assert data.getvalue() == b"[0] gr\\xfc\\xdfe \\udcff\n"


@pytest.mark.parametrize(
    ("told", "typed"),
    [
        ("%runs stop a-1 ends it", "jupyter llmcloud runs stop a-1 ends it"),
        ("There is no cluster: %cluster start.", "There is no cluster: jupyter llmcloud clusters start."),
        ("%endpoints keys list shows their ids", "jupyter llmcloud keys list shows their ids"),
        ("%compress: --method is missing", "jupyter llmcloud compress: --method is missing"),
        ("its %%distribute line; %runsets, 50%runs", "its %%distribute line; %runsets, 50%runs"),
        ("%world restart", "%world restart"),
    ],
    ids=["runs", "cluster", "keys", "compress", "others", "of notebooks alone"],
)
def test_what_a_message_tells_to_type_is_what_a_terminal_takes(told: str, typed: str) -> None:
    assert module.in_terminal(told) == typed
