"""Progress records of all ranks become bars with an ETA."""

from __future__ import annotations

import math

from jupyter_llmcloud.core.metrics.eta import StepDurations, TimeLeft

MAX_BARS = 8
RATE_MEMORY_S = 15.0  # how far back a rate remembers
_SHOWN_BARS = 2


class Bar:
    """One progress bar. Ranks that report it move it by the slowest of them.

    Attributes:
        began_at: what was done when it was first heard of.
        is_repeated: whether it has been full and has begun anew, as that of an epoch does.
    """

    def __init__(self, total: float | None) -> None:
        self.total = total
        self.desc = ""
        self.done = self.began_at = 0.0
        self.is_repeated = False
        self.updated = 0.0
        self._by_rank: dict[int, float] = {}
        self._moved = 0.0
        self._took = 0.0
        self._times = StepDurations()

    def move(self, rank: int, done: float, desc: str, now: float) -> None:
        """A rank reports `done`; going backwards begins the bar anew."""
        before = self._by_rank.get(rank)
        if before is None and not self._by_rank:
            self.done, self.updated, self.began_at = done, now, done
        elif before is not None and done < before:
            self.is_repeated |= before >= (self.total or math.inf)
            self.began_at = min(done, self.began_at)
            self._by_rank = {}
            self._moved = self._took = 0.0
            self._times = StepDurations()
            self.done, self.updated = done, now
        self._by_rank[rank] = done
        self.desc = desc or self.desc
        slowest = min(self._by_rank.values())
        if slowest > self.done:
            self._remember(slowest - self.done, max(0.0, now - self.updated))
            self.done, self.updated = slowest, max(now, self.updated)

    def _remember(self, moved: float, took: float) -> None:
        self._times.add(moved, took)
        keep = math.exp(-took / RATE_MEMORY_S)
        self._moved = self._moved * keep + moved
        self._took = self._took * keep + took

    @property
    def is_complete(self) -> bool:
        """Whether it has reached its total; a bar without a total never does."""
        return bool(self.total) and self.done >= (self.total or 0)

    @property
    def fraction(self) -> float | None:
        """0 to 1, None when the total is unknown."""
        return min(1.0, max(0.0, self.done / self.total)) if self.total else None

    @property
    def rate(self) -> float | None:
        """Units per second, weighted towards the last seconds."""
        return self._moved / self._took if self._took > 0 else None

    def eta(self, now: float) -> float | None:
        """Seconds left at `now`, None when that cannot be known."""
        if (span := self.time_left(now)) is not None:
            return span.middle
        if not self.total or not self.rate:
            return None
        left = (self.total - self.done) / self.rate - max(0.0, now - self.updated)
        return max(0.0, left)

    def time_left(self, now: float) -> TimeLeft | None:
        """The same with an interval, once enough steps have been seen."""
        span = self._times.left(self.total - self.done) if self.total else None
        if span is None:
            return None
        since = max(0.0, now - self.updated)
        return TimeLeft(*(max(0.0, seconds - since) for seconds in (span.low, span.middle, span.high)))


class Progress:
    """The progress bars of a run, told apart by their totals (a description may change with every step)."""

    def __init__(self) -> None:
        self._bars: dict[float | None, Bar] = {}

    def move(self, rank: int, done: float, total: float | None, desc: str, now: float) -> None:
        """A rank's progress record."""
        key = total or None
        if key not in self._bars:
            if len(self._bars) >= MAX_BARS:
                self._forget()
            self._bars[key] = Bar(key)
        self._bars[key].move(rank, done, desc, now)

    def shown(self) -> list[Bar]:
        """The outer bar first, then one inner bar; when all are complete, the one that moved last."""
        moving = [bar for bar in self._bars.values() if not bar.is_complete]
        if moving:
            return moving[:_SHOWN_BARS]
        return sorted(self._bars.values(), key=lambda bar: bar.updated)[-1:]

    def _forget(self) -> None:
        def order(key: float | None) -> tuple[bool, float]:
            return not self._bars[key].is_complete, self._bars[key].updated

        del self._bars[min(self._bars, key=order)]
