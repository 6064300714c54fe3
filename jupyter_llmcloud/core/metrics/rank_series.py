"""One rank's values of one metric, bounded.

A rank's series is a set of cells over the step axis. Each distinct step has its own cell until there are more than
`limit`; from then on a cell covers a power of two of steps, doubled when they become too many. So memory is bounded, a
record costs O(1), and the cells of different ranks lie above each other whatever each of them has logged.

With each value goes when it was logged, and in which epoch; a cell tells that of its last value.

The last value at a step counts: a cell keeps its newest step apart, where another value may replace it. A rank that
goes back to an earlier step (a resumed run, a second loop) replaces what it had said there.
"""

from __future__ import annotations

import math
from itertools import pairwise

RECENT_STEPS = 64  # of which the exact values are kept, so that ranks at different steps have one in common
_START = -math.inf


class Span:
    """What was seen in some steps."""

    __slots__ = (
        "count",
        "epoch",
        "first",
        "high",
        "high_at",
        "last",
        "low",
        "low_at",
        "mean",
        "num_not_finite",
        "time",
    )

    def __init__(self, step: float, value: float, time: float = 0.0, epoch: float | None = None) -> None:
        self.time, self.epoch = time, epoch
        self.first = self.last = step
        self.low_at = self.high_at = step
        is_finite = math.isfinite(value)
        self.count = int(is_finite)
        self.num_not_finite = int(not is_finite)
        self.mean = value if is_finite else 0.0
        self.low = value if is_finite else math.inf
        self.high = value if is_finite else -math.inf

    def add(self, step: float, value: float, time: float = 0.0, epoch: float | None = None) -> None:
        """A value at a step after the last one."""
        self.last, self.time, self.epoch = step, time, epoch
        if not math.isfinite(value):
            self.num_not_finite += 1
            return
        self.count += 1
        self.mean += value / self.count - self.mean / self.count  # divided first: no overflow
        if value < self.low:
            self.low, self.low_at = value, step
        if value > self.high:
            self.high, self.high_at = value, step

    def merge(self, other: Span) -> None:
        """Take in another stretch."""
        if other.last >= self.last:
            self.time, self.epoch = other.time, other.epoch
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        if count := self.count + other.count:
            self.mean = self.mean * (self.count / count) + other.mean * (other.count / count)
        self.count += other.count
        self.num_not_finite += other.num_not_finite
        if other.low < self.low:
            self.low, self.low_at = other.low, other.low_at
        if other.high > self.high:
            self.high, self.high_at = other.high, other.high_at

    def copy(self) -> Span:
        """One that may be changed by itself."""
        twin = Span.__new__(Span)
        twin.first, twin.last, twin.count, twin.mean = self.first, self.last, self.count, self.mean
        twin.low, twin.low_at, twin.high, twin.high_at = self.low, self.low_at, self.high, self.high_at
        twin.num_not_finite, twin.time, twin.epoch = self.num_not_finite, self.time, self.epoch
        return twin


class Bucket:
    """The values of some steps; that of the newest one can still be replaced."""

    __slots__ = ("closed", "epoch", "step", "time", "value")

    def __init__(
        self, step: float, value: float, time: float = 0.0, epoch: float | None = None, closed: Span | None = None
    ) -> None:
        self.step = step
        self.value = value
        self.time = time
        self.epoch = epoch
        self.closed = closed

    def go_on(self, step: float, value: float, time: float, epoch: float | None) -> None:
        """A value at a later step."""
        if self.closed is None:
            self.closed = Span(self.step, self.value, self.time, self.epoch)
        else:
            self.closed.add(self.step, self.value, self.time, self.epoch)
        self.step, self.value, self.time, self.epoch = step, value, time, epoch

    def seen(self) -> Span:
        """All of it."""
        if self.closed is None:
            return Span(self.step, self.value, self.time, self.epoch)
        whole = self.closed.copy()
        whole.add(self.step, self.value, self.time, self.epoch)
        return whole

    def followed_by(self, later: Bucket) -> Bucket:
        """Both as one."""
        closed = self.seen()
        if later.closed is not None:
            closed.merge(later.closed)
        return Bucket(later.step, later.value, later.time, later.epoch, closed)


class RankSeries:
    """Of one rank.

    Attributes:
        reached: the highest step with a value.
        width: of a cell in steps; 0 while every step has its own.
    """

    def __init__(self) -> None:
        self.cells: dict[float, Bucket] = {}
        self.reached = _START
        self.width = 0.0
        self._first = (math.inf, math.nan)
        self._recent: dict[float, float] = {}

    def add(self, step: float, value: float, limit: int, time: float = 0.0, epoch: float | None = None) -> None:
        """The rank's value at a step; at most `limit` cells are kept."""
        self.reached = max(self.reached, step)
        if step <= self._first[0]:
            self._first = (step, value)
        self._recent.pop(step, None)
        self._recent[step] = value
        if len(self._recent) > RECENT_STEPS:
            del self._recent[next(iter(self._recent))]
        key = step // self.width if self.width else step
        cell = self.cells.get(key)
        if cell is None or step < cell.step:
            self.cells[key] = Bucket(step, value, time, epoch)
            if len(self.cells) > limit:
                self._thin(limit // 2 + 1)
        elif step > cell.step:
            cell.go_on(step, value, time, epoch)
        else:
            cell.value, cell.time, cell.epoch = value, time, epoch

    def at(self, step: float) -> float | None:
        """The exact value at a step; None where it is not known any more, or never was."""
        if step in self._recent:
            return self._recent[step]
        if step == self._first[0]:
            return self._first[1]
        cell = self.cells.get(step // self.width if self.width else step)
        return cell.value if cell is not None and cell.step == step else None

    @property
    def began(self) -> float:
        """The lowest step with a value."""
        return self._first[0]

    def num_after(self, step: float) -> int:
        """How many of the recent steps lie behind a step."""
        return sum(recent > step for recent in self._recent)

    def _thin(self, limit: int) -> None:
        self.width = wider(self.width, [cell.step for cell in self.cells.values()], limit)
        joined: dict[float, Bucket] = {}
        for cell in sorted(self.cells.values(), key=lambda cell: cell.step):
            key = cell.step // self.width
            joined[key] = joined[key].followed_by(cell) if key in joined else cell
        self.cells = joined


def wider(width: float, steps: list[float], limit: int) -> float:
    """The smallest power of two from `width` on of which at most `limit` hold all steps."""
    if not width:
        width = 2.0 ** math.floor(math.log2(_usual_gap(steps)))
    while len({step // width for step in steps}) > limit:
        width *= 2
    return width


def _usual_gap(steps: list[float]) -> float:
    """The median distance of neighbours: a lone step far away must not swallow the rest into one cell."""
    ordered = sorted(set(steps))
    return sorted(after - before for before, after in pairwise(ordered))[len(ordered) // 2 - 1]
