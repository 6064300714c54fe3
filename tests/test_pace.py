"""Long work beside the kernel's main thread: it gives way, and leaves the interpreter as it was."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from jupyter_llmcloud.storage.pace import TURN_S, WORK_S, Pace, short_turns


def in_a_thread(work: Callable[[], float]) -> float:
    found: list[float] = []
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


def test_turns_are_short_while_anybody_works_beside_the_main_thread_and_then_as_before() -> None:
    before = sys.getswitchinterval()
    with short_turns():
        assert sys.getswitchinterval() == before  # the main thread itself has nobody to give way to

    def nested() -> float:
        with short_turns():
            with short_turns():
                pass
            return sys.getswitchinterval()

    assert abs(in_a_thread(nested) - TURN_S) < 1e-6
    assert sys.getswitchinterval() == before
