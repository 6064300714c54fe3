"""Long work in a thread of a process that has others to answer: a kernel, a Jupyter server."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
SWITCH_INTERVAL_S = 0.0005
WORK_S = 0.002
REST_S = 0.001
MAX_REST_S = 0.02


class Pace:
    """Rests after so much work, whatever it consists of.

    A thread that never rests gives way only after the interpreter's 5 ms, and an answer of the kernel needs its turn a
    dozen times. Beside the main thread it rests as long as it worked, and as long as it had to wait for others: they
    want to work, too.
    """

    def __init__(self) -> None:
        self._is_beside = threading.current_thread() is not threading.main_thread()
        self._begin()

    def _begin(self) -> None:
        self._worked, self._began = time.thread_time(), time.perf_counter()

    def rest_when_due(self) -> None:
        """Let others have their turn, if it is time."""
        worked = time.thread_time() - self._worked
        if worked >= WORK_S:
            waited = time.perf_counter() - self._began - worked
            time.sleep(min(MAX_REST_S, max(worked, waited)) if self._is_beside else REST_S)
            self._begin()


_turns = threading.Lock()
_num_short = 0
_ordinary_interval_s = 0.0


@contextlib.contextmanager
def short_switch_intervals() -> Iterator[None]:
    """Beside the main thread: what cannot rest, such as an import, gives way sooner than after 5 ms."""
    if threading.current_thread() is threading.main_thread():
        yield
        return
    _count_short(1)
    try:
        yield
    finally:
        _count_short(-1)


def with_short_intervals(work: Callable[..., T], *given: Any) -> T:
    """Do work that cannot rest, in a thread beside a loop that has others to answer."""
    with short_switch_intervals():
        return work(*given)


def _count_short(change: int) -> None:
    global _num_short, _ordinary_interval_s
    with _turns:
        if not _num_short:
            _ordinary_interval_s = sys.getswitchinterval()
        _num_short += change
        sys.setswitchinterval(min(SWITCH_INTERVAL_S, _ordinary_interval_s) if _num_short else _ordinary_interval_s)
