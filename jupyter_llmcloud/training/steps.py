"""Counts optimizer steps, and stops all ranks after the same one.

To stop, the agent asks each rank for its step (answered by the side thread, which is never blocked); a rank that was
asked waits at its next boundary until it is told where to stop. The answer is one more than the largest step, which no
rank can have passed, so all ranks raise KeyboardInterrupt after the same step and the process group stays healthy.
"""

from __future__ import annotations

import threading
from typing import Any

PATIENCE_S = 2.0  # a rank that hears nothing goes on: a later rung of the ladder will stop it


class Steps:
    """The step counter of a rank's cell."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.begin()

    def begin(self) -> None:
        """A new cell."""
        with self._changed:
            self.count = 0
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

    def boundary(self, *_: Any) -> None:
        """One more step is finished. Raises KeyboardInterrupt when it is the last one."""
        if threading.current_thread() is not threading.main_thread():
            return
        with self._changed:
            self.count += 1
            if self._asked:
                self._changed.wait_for(lambda: not self._asked, timeout=PATIENCE_S)
            if self._limit is not None and self.count >= self._limit:
                self._limit = None
                raise KeyboardInterrupt("stopped after the same step on every rank")
