"""What `make demo` says while it trains: how far the run is, and how long it takes."""

from __future__ import annotations

import importlib
import io
from typing import Any

import pytest

from tests.support.leaks import REPOSITORY


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
