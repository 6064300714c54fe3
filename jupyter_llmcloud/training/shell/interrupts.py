"""A Stop becomes a KeyboardInterrupt of the cell; of a cell that goes on all the same, until it has ended.

Loops that catch everything (`except: continue`) take an interrupt for a bad batch. The last rung of a Stop is to kill
the rank, and its variables with it: a while before that, interrupts come again and again, and the next line that the
cell or what it called comes to after one raises another, which is inside the handler that has caught the first. Where
that one is caught too, by a handler around the first, the same happens again as soon as that handler lets go of it, or
calls something.

An interrupt between the taking of a lock and the block that gives it back would leave the lock taken for ever; where
the lock is a queue's, the next to wait for it is the loader that ends its workers. So one that finds the thread within
Python's own code of locks and queues comes again in a moment, until it finds the thread elsewhere, or waiting there.
So does one that finds it in a `__del__`, such as that of a pass over a loader, which waits for the workers: Python goes
on behind that whatever is raised in it.
"""

from __future__ import annotations

import multiprocessing.queues
import multiprocessing.synchronize
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

PATIENCE_S = 4.0  # after the first interrupt; the agent kills 6.5 seconds after the Stop
GIVEN_UP_S = 10.0
BETWEEN_S = (0.001, 0.004)  # not regular: a loop may be as regular
MAX_PUT_OFF = 100  # times, about a quarter of a second; who is still in the code of locks then waits for one
AGAIN_S = 0.002
_OF_LOCKS = {module.__file__ for module in (threading, queue, multiprocessing.queues, multiprocessing.synchronize)}


class Interrupts:
    """Those of one rank.

    Args:
        is_cell: whether code of this file is a cell's.
        is_drawing: whether a traceback is drawn, when what was asked for has been done already.

    Attributes:
        executing: a cell is being executed.
    """

    def __init__(self, is_cell: Callable[[str], bool], is_drawing: Callable[[], bool]) -> None:
        self.executing = False
        self._is_cell = is_cell
        self._is_drawing = is_drawing
        # Of the cell that was interrupted: True for an interrupt that is to come again, False when it has ended.
        # A handler of signals may put into no other kind of queue.
        self._told: queue.SimpleQueue[bool] | None = None
        self._num_put_off = 0
        self._insists = False
        self.catch()

    def catch(self) -> None:
        """Take the signal; an earlier cell may have set a handler of its own."""
        if signal.getsignal(signal.SIGINT) != self._on_signal:
            signal.signal(signal.SIGINT, self._on_signal)
        self._thread = threading.get_ident()

    def begin(self) -> None:
        """A cell is executed from now on."""
        self._let_go()  # of an interrupt that came as the one before ended
        self.executing = True

    def end(self) -> None:
        """It has ended."""
        self.executing = False
        self._let_go()
        if sys.gettrace() == self._trace:
            sys.settrace(None)
        if sys.getprofile() == self._profile:
            sys.setprofile(None)

    def _let_go(self) -> None:
        self._insists = False
        self._num_put_off = 0
        told, self._told = self._told, None
        if told is not None:
            told.put(False)

    def press(self) -> None:
        """Interrupt the cell. Called in another thread than the one that executes it."""
        if self.executing and self._told is None:
            self._told = queue.SimpleQueue()
            threading.Thread(target=self._insist, args=(self._told,), name="llmcloud-stop", daemon=True).start()
        os.kill(os.getpid(), signal.SIGINT)

    def _insist(self, told: queue.SimpleQueue[bool]) -> None:
        if _has_ended(told, PATIENCE_S):
            return
        self._insists = self._told is told
        deadline = time.monotonic() + GIVEN_UP_S
        while not _has_ended(told, random.SystemRandom().uniform(*BETWEEN_S)) and time.monotonic() < deadline:
            os.kill(os.getpid(), signal.SIGINT)

    def _on_signal(self, _: int, frame: FrameType | None) -> None:
        if not self.executing or self._is_drawing() or self._is_put_off(frame):
            return
        if self._insists and not self._insist_on(frame):
            return
        raise KeyboardInterrupt

    def _is_put_off(self, frame: FrameType | None) -> bool:
        told = self._told
        is_locking = frame is not None and frame.f_code.co_filename in _OF_LOCKS
        is_dropping = _is_dropping(frame)
        if told is None or not (is_locking or is_dropping):
            return False
        is_last = self._num_put_off >= MAX_PUT_OFF
        if is_dropping or not is_last:
            told.put(True)
        self._num_put_off += not is_last
        return not is_last

    def _inside_cell(self, frame: FrameType | None) -> Iterator[FrameType]:
        """The frames from this one to the outermost of the cell; none when the code is in no cell."""
        frames = []
        while frame is not None:
            frames.append(frame)
            if self._is_cell(frame.f_code.co_filename):
                yield from frames
                frames = []
            frame = frame.f_back

    def _insist_on(self, frame: FrameType | None) -> bool:
        """Interrupt the next line of the cell; False where it has left the cell, or is in here."""
        inside = list(self._inside_cell(frame))
        if any(one.f_code.co_filename == __file__ for one in inside):
            return False
        for one in inside:
            one.f_trace = self._trace
        if inside:
            sys.settrace(self._trace)
            sys.setprofile(self._profile)
        return bool(inside)

    def _trace(self, _: FrameType, event: str, __: Any) -> Any:
        """Called by Python, which lets go of it as soon as it has raised."""
        if event == "call":
            return None
        if event == "line" and self.executing:
            raise _Insistent(self._caught)
        return self._trace

    def _profile(self, frame: FrameType, _: str, __: Any) -> None:
        """Called by Python at calls, also where it has let go of the other."""
        self._caught(frame)

    def _caught(self, frame: FrameType | None) -> None:
        insists = self.executing and self._insists and not self._is_drawing()
        if insists and sys.gettrace() is None and threading.get_ident() == self._thread:
            self._insist_on(frame)


def _is_dropping(frame: FrameType | None) -> bool:
    """Whether Python is about to drop an object, which keeps what is raised meanwhile from the cell."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _has_ended(told: queue.SimpleQueue[bool], within_s: float) -> bool:
    """Whether the cell ends within so many seconds; meanwhile what was put off comes again."""
    until = time.monotonic() + within_s
    while True:
        try:
            if not told.get(timeout=max(0.0, until - time.monotonic())):
                return True
        except queue.Empty:
            return False
        time.sleep(AGAIN_S)
        os.kill(os.getpid(), signal.SIGINT)


class _Insistent(KeyboardInterrupt):
    """Says when a handler has let go of it."""

    def __init__(self, caught: Callable[[FrameType | None], None]) -> None:
        super().__init__()
        self._caught = caught

    def __del__(self) -> None:
        self._caught(sys._getframe(1))


_Insistent.__name__ = _Insistent.__qualname__ = KeyboardInterrupt.__name__  # as it is shown
