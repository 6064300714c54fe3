"""What `make demo` says while it trains: how far the run is, and how long it takes. A signal ends all of it."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import write_notebook
from tests.support.leaks import REPOSITORY
from tests.support.worlds import until


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "notebooks"))
    return importlib.import_module("run_quickstart")


class Out(io.StringIO):
    """A stream that is a terminal or not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


RUN = {
    "run_id": "r",
    "name": "gpt",
    "state": "running",
    "progress": [10.0, 100.0],
    "metrics": {"loss": 2.31, "x": None},
}


def test_the_demo_says_how_far_a_run_is_and_how_long_it_takes(demo: Any) -> None:
    progress = demo.Progress(None, Out(False))
    assert progress.line({**RUN, "state": "queued", "phase": "starting ranks"}, 0.0) == "gpt  starting ranks"
    assert progress.line(RUN, 0.0) == "gpt  10/100  10 %  loss 2.31"
    assert progress.line({**RUN, "progress": [20.0, 100.0]}, 10.0) == "gpt  20/100  20 %  ETA 1 min 20 s  loss 2.31"
    assert "ETA 1 min 15 s" in progress.line({**RUN, "progress": [20.0, 100.0]}, 15.0)  # no step since
    assert progress.line({**RUN, "progress": [7.0, None], "metrics": {}}, 16.0) == "gpt  7"
    hang = {"t": 0.0, "text": "rank 1 is late.", "late": [1], "waiting": []}
    assert progress.line({**RUN, "progress": None, "hang": hang}, 16.0).endswith("rank 1 is late.")


@pytest.mark.parametrize(
    ("is_terminal", "written"), [(True, "\r\x1b[K      a\r\x1b[K      b\r\x1b[K"), (False, "      a\n      b\n")]
)
def test_the_demo_draws_one_line_in_a_terminal_and_lines_elsewhere(demo: Any, is_terminal: bool, written: str) -> None:
    progress = demo.Progress(None, out := Out(is_terminal))
    for line in ("a", "b"):
        progress._draw(line)
    progress._erase()
    assert out.getvalue() == written


RUN_DEMO = """
import pathlib, sys
import run_quickstart
run_quickstart.NOTEBOOK = pathlib.Path(sys.argv.pop(1))
sys.exit(run_quickstart.main())
"""
FOR_EVER = """%%distribute -n 1 --name endless
import os, pathlib, time
pathlib.Path(os.environ["SEEN"]).write_text(str(os.getpid()))
while True:
    time.sleep(0.1)
"""


def start_demo(tmp_path: Path) -> subprocess.Popen[str]:
    notebook = write_notebook(tmp_path / "endless.ipynb", ["%load_ext jupyter_llmcloud", FOR_EVER])
    folder = str(REPOSITORY / "notebooks")
    env = {**os.environ, "SEEN": str(tmp_path / "seen"), "PYTHONPATH": f"{folder}:{os.environ['PYTHONPATH']}"}
    command = [sys.executable, "-c", RUN_DEMO, str(notebook), "--output", str(tmp_path / "executed.ipynb")]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.story
def test_the_demo_that_is_terminated_while_it_trains_leaves_nothing(tmp_path: Path) -> None:
    with start_demo(tmp_path) as demo:
        until((tmp_path / "seen").exists, "its ranks run", 120)
        demo.send_signal(signal.SIGTERM)
        said, _ = demo.communicate(timeout=120)
    assert demo.returncode == 128 + signal.SIGTERM, said
    assert "SIGTERM: ending what was started" in said and (tmp_path / "executed.ipynb").exists()
    # What it had started (a server, a kernel, a cluster with its ranks) would be found by the fixture of all tests.


def test_the_demo_that_is_interrupted_while_its_server_starts_leaves_nothing(tmp_path: Path) -> None:
    import psutil

    with start_demo(tmp_path) as demo:
        until(lambda: psutil.Process(demo.pid).children(), "its server has been started", 60)
        for _ in range(3):  # an impatient user
            demo.send_signal(signal.SIGINT)
        said, _ = demo.communicate(timeout=120)
    assert demo.returncode == 128 + signal.SIGINT, said
    assert "Traceback" not in said
