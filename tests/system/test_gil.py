"""Long work beside the kernel's main thread: it gives way, and leaves the interpreter as it was."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.storage import log_text
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunFolder
from jupyter_llmcloud.system.gil import SWITCH_INTERVAL_S, WORK_S, Pace, short_switch_intervals

pytestmark = pytest.mark.alone


def in_a_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def longest_piece() -> float:
    """CPU time between two rests."""
    pace, longest, rested = Pace(), 0.0, time.thread_time()
    end = rested + 0.1
    while time.thread_time() < end:
        before = time.perf_counter()
        pace.rest_when_due()
        if time.perf_counter() - before >= WORK_S / 2:
            longest, rested = max(longest, time.thread_time() - rested), time.thread_time()
    return longest


def test_work_in_a_thread_rests_after_a_few_milliseconds() -> None:
    assert 0 < in_a_thread(longest_piece) < 5 * WORK_S


@pytest.mark.parametrize(
    ("text", "longest_s"), [("".join(f"line {n} {'x' * 90}\n" for n in range(600)), 0.01), ("x" * 60_000, 0.05)]
)
def test_a_long_log_is_written_in_short_pieces(
    text: str, longest_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lines, and as one line of millions of characters: measured in its own thread's CPU time, on any machine."""
    folder = RunFolder(tmp_path)
    for rank in (0, 1):
        journal = JournalWriter(folder.logs(rank))
        for _ in range(100):
            journal.append([{"kind": "stdout", "text": text}])
        journal.close()
    pieces: list[float] = []
    rest = Pace.rest_when_due

    def noted(pace: Pace) -> None:
        before, worked = pace._worked, time.thread_time() - pace._worked
        rest(pace)
        if pace._worked != before:
            pieces.append(worked)

    monkeypatch.setattr(Pace, "rest_when_due", noted)
    path = in_a_thread(lambda: log_text.write(folder))
    assert sum(line.count("x") for line in path.open()) == 200 * text.count("x")
    assert len(pieces) > 5 and max(pieces) < longest_s


def test_turns_are_short_while_anybody_works_beside_the_main_thread_and_then_as_before() -> None:
    before = sys.getswitchinterval()
    with short_switch_intervals():
        assert sys.getswitchinterval() == before  # the main thread itself has nobody to give way to

    def nested() -> float:
        with short_switch_intervals():
            with short_switch_intervals():
                pass
            return sys.getswitchinterval()

    assert abs(in_a_thread(nested) - SWITCH_INTERVAL_S) < 1e-6
    assert sys.getswitchinterval() == before
