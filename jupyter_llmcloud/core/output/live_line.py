"""The line below all others: what one rank is still writing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from jupyter_llmcloud.core.output.blocks import Joiner

MAX_PASSING_WIDTH = 120
_PASSING_EVERY_S = 0.1
_SLOWDOWN = 0.02  # after t seconds it is rewritten every t/50: a few hundred times however long the run


class Unfinished(Protocol):
    """Text that goes on: a line without its end, or the newest line of all that is left out."""

    is_rewritten: bool
    live_since: float

    @property
    def is_live(self) -> bool:
        """Is there any?"""

    @property
    def current(self) -> str:
        """The line as it looks now."""


class PassingLine:
    """The one line that is rewritten in place: the newest state of what one rank is still writing.

    It is written to stdout whatever the rank wrote it to: front ends give stderr a colour of alarm, and a
    line that comes and goes must not break that stream in pieces.
    """

    def __init__(self, hold_s: float, budget: int) -> None:
        self._hold_s = hold_s
        self._budget = budget
        self._slowdown = _SLOWDOWN
        self._writer: tuple[int, str] | None = None
        self._screen: Unfinished | None = None
        self._began: float | None = None
        self._shown_at: float | None = None
        self._shown = ""
        self._is_new = False

    def touch(self, writer: tuple[int, str], screen: Unfinished, now: float) -> None:
        """A rank's unfinished text has changed; the lowest rank that writes is followed."""
        if self._began is None:
            self._began = now
        if self._live() is None or self._writer is None or writer <= self._writer:
            self._writer, self._screen = writer, screen
        if self._writer == writer:
            self._is_new = True

    def slow_down(self, budget: int) -> None:
        """From now on write no more than that, and five times more rarely."""
        self._budget, self._slowdown = budget, 5 * _SLOWDOWN

    @property
    def due(self) -> float | None:
        """When the newest state may be shown."""
        screen = self._live()
        if not self._is_new or screen is None or self._budget <= 0 or self._began is None:
            return None
        ripe = screen.live_since + (0.0 if screen.is_rewritten else 3 * self._hold_s)
        if self._shown_at is None:
            return ripe
        return max(ripe, self._shown_at + max(_PASSING_EVERY_S, (self._shown_at - self._began) * self._slowdown))

    def show(self, blocks: Joiner, label: Callable[[tuple[int, ...]], str], now: float) -> int:
        """Rewrite the line when its time has come; how many characters that took."""
        due, screen = self.due, self._live()
        if due is None or now < due or screen is None or self._writer is None:
            return 0
        ranks = (self._writer[0],)
        text = f"{label(ranks)} {screen.current[-MAX_PASSING_WIDTH:]}".lstrip()
        written = "\r" + text.ljust(len(self._shown))
        self._budget -= len(written)
        self._shown, self._shown_at, self._is_new = text, now, False
        blocks.add("stdout", written, ranks, passing=True)
        return len(written)

    def erase(self, blocks: Joiner) -> None:
        """Take the line away."""
        if self._shown:
            blocks.add("stdout", "\r" + " " * len(self._shown) + "\r", (), passing=True)
            self._shown = ""
            self._is_new = True

    def over(self, text: str) -> str:
        """`text` for stdout, written over the line that is shown, if any."""
        if self._shown:
            text, self._shown = "\r" + text.ljust(len(self._shown)), ""
            self._is_new = True
        return text

    def _live(self) -> Unfinished | None:
        return self._screen if self._screen is not None and self._screen.is_live else None
