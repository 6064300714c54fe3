"""Requests that come in the same moment are handed on together: a step that has begun takes nobody along."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# From the bytes of a request to its sequence a server takes some rounds of its event loop, each of them short.
_QUIET_ROUNDS = 5
_AT_MOST_S = 0.01


class Gathering:
    """Calls `hand_on` after something was added: soon, but not while more comes with every round of the event loop.

    Args:
        hand_on: called in the event loop of what was added first.
        clock: seconds.
    """

    def __init__(self, hand_on: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._hand_on = hand_on
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._left = 0
        self._ends = 0.0

    def added(self, loop: asyncio.AbstractEventLoop, *, is_idle: bool) -> None:
        """One was added, in this event loop; `is_idle`: nothing is being computed that it could wait behind anyway."""
        self._left = _QUIET_ROUNDS if is_idle else 1
        if self._loop is loop:
            return
        self._loop, self._ends = loop, self._clock() + _AT_MOST_S
        loop.call_soon(self._round, loop)

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left -= 1
        if self._left > 0 and self._clock() < self._ends:
            loop.call_soon(self._round, loop)
            return
        if self._loop is loop:
            self._loop = None
        self._hand_on()
