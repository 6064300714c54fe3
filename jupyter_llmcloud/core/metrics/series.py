"""Metric records of all ranks become one bounded series per metric.

A series is a set of buckets over the step axis. Each distinct step has its own bucket until there are more
than `max_points`; from then on a bucket covers a power of two of steps, doubled when they become too many. So
the records of slow ranks find their bucket whenever they arrive, memory is bounded, and a record costs O(1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jupyter_llmcloud.core.metrics.progress import Progress

MAX_POINTS = 500
MAX_METRICS = 100


@dataclass(frozen=True)
class Point:
    """One place on a chart: the mean over ranks (and steps, when thinned), its spread, or None."""

    step: float
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Extreme:
    """An exact value and the step it was seen at."""

    step: float
    value: float


class _Bucket:
    """What was seen in a stretch of steps."""

    __slots__ = ("count", "first", "high", "last", "low", "mean")

    def __init__(self, step: float) -> None:
        self.first = self.last = step
        self.count = 0
        self.mean = 0.0
        self.low = math.inf
        self.high = -math.inf

    def add(self, value: float) -> None:
        self.count += 1
        self.mean += value / self.count - self.mean / self.count  # divided first: no overflow
        if value < self.low:
            self.low = value
        if value > self.high:
            self.high = value

    def merge(self, other: _Bucket) -> None:
        self.first = min(self.first, other.first)
        self.last = max(self.last, other.last)
        if count := self.count + other.count:
            self.mean = self.mean * (self.count / count) + other.mean * (other.count / count)
        self.count += other.count
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)

    def copy(self) -> _Bucket:
        twin = _Bucket(self.first)
        twin.merge(self)
        return twin

    def point(self, step: float | None = None) -> Point:
        where = (self.first + self.last) / 2 if step is None else step
        if not self.count:
            return Point(where, None, None, None)
        return Point(where, self.mean, self.low, self.high)


class Series:
    """One metric over steps."""

    def __init__(self, name: str, max_points: int = MAX_POINTS) -> None:
        if max_points < 8:
            raise ValueError(f"max_points={max_points}: a series needs at least 8 points.")
        self.name = name
        self.max_points = max_points
        self.num_values = 0
        self.num_not_finite = 0
        self.first_not_finite: float | None = None
        self.lowest: Extreme | None = None
        self.highest: Extreme | None = None
        self._width = 0.0  # 0: every step has a bucket of its own
        self._buckets: dict[float, _Bucket] = {}
        self._first: _Bucket | None = None
        self._last: _Bucket | None = None

    def add(self, step: float, value: float) -> None:
        """Take in one rank's value at a step."""
        key = step // self._width if self._width else step
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(step)
        elif step > bucket.last:
            bucket.last = step
        elif step < bucket.first:
            bucket.first = step
        self._add_to_ends(step, value)
        self._count(step, value)
        if math.isfinite(value):
            bucket.add(value)
        if len(self._buckets) > self.max_points - 2:  # room for the exact first and last
            self._thin()

    def points(self, max_points: int | None = None) -> list[Point]:
        """The series in order of steps, at most `max_points` long; its first and last points are exact."""
        if self._first is None or self._last is None:
            return []
        limit = max(8, min(max_points or self.max_points, self.max_points))
        buckets, width = self._buckets, self._width
        if len(buckets) > limit - 2:
            buckets, width = _thinned(buckets, width, limit - 2)
        points = [buckets[key].point() for key in sorted(buckets)]
        if width:
            points = [self._first.point(), *points, self._last.point()]
            return [point for at, point in enumerate(points) if not at or point.step > points[at - 1].step]
        return points

    @property
    def ends(self) -> tuple[float, float] | None:
        """The first and the last step."""
        return (self._first.first, self._last.last) if self._first and self._last else None

    @property
    def last(self) -> Point | None:
        """The newest step: mean over the ranks that have reported it; None as mean when not finite."""
        return self._last.point() if self._last else None

    def _add_to_ends(self, step: float, value: float) -> None:
        if self._first is None or step < self._first.first:
            self._first = _Bucket(step)
        if self._last is None or step > self._last.first:
            self._last = _Bucket(step)
        if math.isfinite(value):
            if step == self._first.first:
                self._first.add(value)
            if step == self._last.first:
                self._last.add(value)

    def _count(self, step: float, value: float) -> None:
        self.num_values += 1
        if not math.isfinite(value):
            self.num_not_finite += 1
            if self.first_not_finite is None or step < self.first_not_finite:
                self.first_not_finite = step
            return
        if self.lowest is None or value < self.lowest.value:
            self.lowest = Extreme(step, value)
        if self.highest is None or value > self.highest.value:
            self.highest = Extreme(step, value)

    def _thin(self) -> None:
        self._buckets, self._width = _thinned(self._buckets, self._width, self.max_points // 2)


def _thinned(buckets: dict[float, _Bucket], width: float, limit: int) -> tuple[dict[float, _Bucket], float]:
    """The same buckets joined to at most `limit`, and their width: the smallest power of two that does it."""
    steps = [bucket.first for bucket in buckets.values()]
    if not width:
        width = 2.0 ** math.floor(math.log2(_usual_gap(steps)))
    while len({step // width for step in steps}) > limit:
        width *= 2
    joined: dict[float, _Bucket] = {}
    for bucket in buckets.values():
        key = bucket.first // width
        if key in joined:
            joined[key].merge(bucket)
        else:
            joined[key] = bucket.copy()
    return joined, width


def _usual_gap(steps: list[float]) -> float:
    """The median distance of neighbours: a lone step far away must not swallow the rest into one bucket."""
    ordered = sorted(steps)
    return sorted(after - before for before, after in pairwise(ordered))[len(ordered) // 2 - 1]


class MetricCollector:
    """Takes the metric journals of all ranks, in any interleaving, at least once; keeps series and bars."""

    def __init__(self, max_points: int = MAX_POINTS, max_metrics: int = MAX_METRICS) -> None:
        self.max_points = max_points
        self.max_metrics = max_metrics
        self.series: dict[str, Series] = {}
        self.progress = Progress()
        self.num_records = 0
        self.num_left_out = 0  # values of metrics beyond `max_metrics`
        self._seq: dict[int, int] = {}
        self._order: dict[int, int] = {}

    def feed(self, rank: int, records: Iterable[Mapping[str, Any]], now: float = 0.0) -> bool:
        """Take in records of one rank; True when anything was new. `now` stands in for a missing `t`."""
        changed = False
        for record in records:
            if self._is_new(rank, record):
                self.num_records += 1
                changed = True
                self._take(rank, record, now)
        return changed

    def _is_new(self, rank: int, record: Mapping[str, Any]) -> bool:
        seq = record.get("seq")
        if seq is None:
            return True
        if seq <= self._seq.get(rank, 0):
            return False
        self._seq[rank] = seq
        return True

    def _take(self, rank: int, record: Mapping[str, Any], now: float) -> None:
        if values := record.get("values"):
            step = self._step(rank, record)
            for name, value in values.items():
                self._take_value(str(name), step, value)
        if progress := record.get("progress"):
            done, total = (_number(part) for part in (*progress, None)[:2])
            if done is not None and math.isfinite(done):
                total = total if total and math.isfinite(total) and total > 0 else None
                self.progress.move(rank, done, total, str(record.get("desc") or ""), record.get("t", now))

    def _step(self, rank: int, record: Mapping[str, Any]) -> float:
        step = _number(record.get("step"))
        if step is not None and math.isfinite(step):
            return step
        self._order[rank] = self._order.get(rank, 0) + 1
        return self._order[rank]

    def _take_value(self, name: str, step: float, value: Any) -> None:
        number = math.nan if value is None else _number(value)  # JSON has no NaN: some writers say null
        if number is None:
            return
        series = self.series.get(name)
        if series is None:
            if len(self.series) >= self.max_metrics:
                self.num_left_out += 1
                return
            series = self.series[name] = Series(name, self.max_points)
        series.add(step, number)


def _number(value: Any) -> float | None:
    """A number to draw, an int where it is one (an axis says 7, not 7.0); None for what is no number."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else _as_float(value)
    return value if isinstance(value, float) else None


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
