"""Counts optimizer steps, and stops all ranks after the same one.

To stop, the agent asks each rank for its step (answered by the side thread, which is never blocked); a rank that was
asked waits at its next boundary until it hears where to stop. The answer is one more than the largest step, which no
rank can have passed, so all ranks raise KeyboardInterrupt after the same step and the process group stays healthy.

Where several optimizers step in one iteration of the loop (a generator and its critic), the iteration is finished
first. Which optimizers belong to it follows from the order of their steps, which is the same on every rank.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

MAX_STEPS = 32  # of one iteration; a stop waits for no longer one
PATIENCE_S = 2.0  # a rank that hears nothing goes on: a later rung of the ladder will stop it


@dataclass
class _Stepping:
    """One optimizer. `gap` is the longest distance between two of its steps, counted in steps of all."""

    iterations: int
    last: int
    gap: int = MAX_STEPS // 2


class Iterations:
    """Tells from the order in which optimizers step whether an iteration of the training loop is complete."""

    def __init__(self) -> None:
        self._count = 0
        self._stepping: weakref.WeakKeyDictionary[Any, _Stepping] = weakref.WeakKeyDictionary()

    def step(self, optimizer: Any) -> bool:
        """It has stepped; returns whether every optimizer of the loop has now stepped as often as it has."""
        self._count += 1
        own = self._stepping.get(optimizer)
        if own is None:
            for other in self._stepping.values():
                other.iterations = 1
            self._stepping[optimizer] = _Stepping(1, self._count)
            return True
        distance = self._count - own.last
        own.gap = distance if own.gap == MAX_STEPS // 2 else max(own.gap, distance)
        own.last = self._count
        own.iterations += 1
        if len(self._stepping) == 1:
            return True
        self._drop_idle()
        return all(other.iterations >= own.iterations for other in self._stepping.values())

    def _drop_idle(self) -> None:
        """An optimizer that has not stepped for long belongs to an earlier part of the cell."""
        idle = [item for item, state in self._stepping.items() if self._count - state.last > 2 * state.gap]
        for optimizer in idle:
            del self._stepping[optimizer]


class Steps:
    """The step counter of a rank's cell."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.begin()

    def begin(self) -> None:
        """A new cell."""
        with self._changed:
            self.count = 0
            self._iterations = Iterations()
            self._asked = False
            self._limit: int | None = None

    def ask(self) -> int:
        """Steps finished so far; the next boundary waits for `stop_at`."""
        with self._changed:
            self._asked = True
            return self.count

    def stop_at(self, step: int) -> None:
        """Raise in the main thread when `step` steps are finished; -1: go on."""
        with self._changed:
            self._asked = False
            self._limit = step if step >= 0 else None
            self._changed.notify_all()

    def boundary(self, optimizer: Any, *_: Any) -> None:
        """One more step is finished. Raises KeyboardInterrupt when it is the last one."""
        if threading.current_thread() is not threading.main_thread():
            return
        with self._changed:
            self.count += 1
            complete = self._iterations.step(optimizer)
            if self._asked:
                self._changed.wait_for(lambda: not self._asked, timeout=PATIENCE_S)
            if self._limit is not None and self.count >= self._limit + (0 if complete else MAX_STEPS):
                self._limit = None
                raise KeyboardInterrupt("stopped after the same step on every rank")
