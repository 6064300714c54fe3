"""The notebook's Stop while a cell waits: counted, never raised in the middle of a message."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SAME_STOP_S = 0.5
# Kept from cell to cell: making one lets the thread that saves the notebook's history take over, and the cell waits.
_pipes: list[tuple[int, int]] = []
os.register_at_fork(after_in_child=_pipes.clear)


def _take_pipe() -> tuple[int, int]:
    if _pipes:
        return _pipes.pop()
    ends = os.pipe()
    for fd in ends:
        os.set_blocking(fd, False)
    return ends


class StopSignal:
    """Within the block SIGINT makes `fd` readable and is counted in `presses`. Works in the main thread only.

    Args:
        is_no_stop: says of a press that has just come that it is not meant as one; it may take a moment.

    Attributes:
        is_leaving: a press was no Stop, since this process is about to end.
        passed_on: how many of the presses whoever waits here has passed on.
        requests: the numbers of the requests by which that was done.
    """

    def __init__(self, is_no_stop: Callable[[], bool] = lambda: False) -> None:
        self._is_no_stop = is_no_stop
        self.is_leaving = False
        self.presses = self.passed_on = 0
        self.requests: set[int] = set()
        self.fd, self._write = _take_pipe()
        self._previous: object = None
        self._installed = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._press)
            self._installed = True
        return self

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.is_leaving or self._is_no_stop():
            self.is_leaving = True
        else:
            self.presses += 1
        os.write(self._write, b".")

    def drain(self) -> None:
        """Make `fd` quiet again."""
        try:
            os.read(self.fd, 1024)
        except BlockingIOError:
            pass

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]
            if self.presses:
                swallow_more_presses()
        if self.presses:
            self.drain()
        _pipes.append((self.fd, self._write))


class _OneStop:
    """A handler of SIGINT: for a moment it does nothing, then what the one before it does."""

    def __init__(self, previous: Any) -> None:
        self.previous = previous
        self.until = time.monotonic() + SAME_STOP_S

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() > self.until and callable(self.previous):
            self.previous(number, frame)


def swallow_more_presses() -> None:
    """A Stop was obeyed: the next press, if it comes at once, meant the same.

    It would hit ipykernel while it tells of the cell's end, which is lost then: the cell would look busy for ever.
    ipykernel puts its own handler back between two cells.
    """
    if threading.current_thread() is threading.main_thread():
        known = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, _OneStop(known.previous if isinstance(known, _OneStop) else known))


@contextmanager
def said_when_stopped(message: str) -> Iterator[None]:
    """A Stop within the block is shown as this message, not as a traceback of ours."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        swallow_more_presses()
        if hasattr(stopped, "_render_traceback_"):  # said within
            raise
        raise said(message, f"KeyboardInterrupt: {message}") from None


def said(message: str, *lines: str) -> KeyboardInterrupt:
    """What ends a cell, and Run All with it, shown as these lines; as its message when there are none."""
    error = KeyboardInterrupt(message)
    error._render_traceback_ = lambda: [*lines] or [message]  # type: ignore[attr-defined]
    return error
