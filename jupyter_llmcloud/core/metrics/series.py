"""The metric records of all ranks become one bounded series per metric.

A mean over ranks is a number of its own: it is made only of steps that all of them have reached, and says of how many
ranks it is one. A rank that has never logged the metric is none of its ranks; nor is one that has gone, from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.metrics.not_finite import NotFinite
from jupyter_llmcloud.core.metrics.progress import Progress
from jupyter_llmcloud.core.metrics.rank_series import RankSeries, Span, wider
from jupyter_llmcloud.core.metrics.values import StepCount, as_number

MAX_POINTS = 500
MAX_METRICS = 100
MAX_CELLS = 8192  # of all ranks of a metric
MIN_CELLS = 128  # of each of them
FAR_AHEAD = 10  # steps; ranks that log in turns are no further apart


@dataclass(frozen=True)
class Point:
    """One place on a chart: the mean over ranks (and steps, when thinned) and its spread.

    They are None where the mean is not finite. `num_ranks` have a value there; `num_not_finite` values are left out.
    `time` and `epoch` are those of the last value.
    """

    step: float
    mean: float | None
    low: float | None
    high: float | None
    num_ranks: int = field(default=1, compare=False)
    num_not_finite: int = field(default=0, compare=False)
    time: float = field(default=0.0, compare=False)
    epoch: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Extreme:
    """An exact value and the step it was seen at."""

    step: float
    value: float


class Series:
    """One metric over steps.

    Args:
        gone: ranks that log nothing any more; whoever makes the series keeps it up to date.

    Attributes:
        num_values: taken in so far.
        dirty_from: the lowest step at which something was taken in since somebody set it to infinity.
    """

    def __init__(self, name: str, max_points: int = MAX_POINTS, gone: Set[int] = frozenset()) -> None:
        if max_points < 8:
            raise ValueError(f"max_points={max_points}: a series needs at least 8 points.")
        self.name = name
        self.max_points = max_points
        self.num_values = 0
        self.dirty_from = -math.inf
        self.not_finite = NotFinite()
        self._gone = gone
        self._ranks: dict[int, RankSeries] = {}

    def add(self, step: float, value: float, rank: int = 0, *, time: float = 0.0, epoch: float | None = None) -> None:
        """Take in a rank's value at a step; a later one at the same step takes its place.

        `time` says when it was logged, in seconds since the epoch; `epoch` is the newest value of the metric "epoch".
        """
        self.num_values += 1
        self.dirty_from = min(self.dirty_from, step)
        if rank not in self._ranks:
            self._ranks[rank] = RankSeries()
        limit = min(self.max_points - 2, max(MIN_CELLS, MAX_CELLS // len(self._ranks)))  # room for the exact ends
        self._ranks[rank].add(step, value, limit, time, epoch)
        self.not_finite.add(rank, step, value)

    # --- what is drawn ---

    def points(self, max_points: int | None = None) -> list[Point]:
        """The steps that all ranks have reached, in order, at most `max_points`; the first and last are exact."""
        if not self._ranks:
            return []
        limit = max(8, min(max_points or self.max_points, self.max_points))
        width = self.column_width(limit - 2)
        columns = self.columns(width)
        end = self.reached
        points = [point_of(columns[key].values()) for key in sorted(columns)]
        ends = [max(seen.last for seen in columns[key].values()) for key in sorted(columns)]
        points = [point for point, last in zip(points, ends, strict=True) if last <= end]
        if not width:
            return points
        points = [self._exact(self._began), *points, self._exact(end)]
        return [point for at, point in enumerate(points) if not at or point.step > points[at - 1].step]

    def column_width(self, limit: int) -> float:
        """Steps that a column covers, for at most `limit` of them; 0 while each step has its own."""
        width = max(series.width for series in self._ranks.values())
        steps = {cell.step for _, cell in self._cells()}
        if len({step // width for step in steps} if width else steps) > limit:
            width = wider(width, list(steps), limit)
        return width

    def columns(self, width: float, from_key: float = -math.inf) -> dict[float, dict[int, Span]]:
        """What each rank says in each column from one on; a column's key is its first step in units of `width`."""
        columns: dict[float, dict[int, Span]] = {}
        least = from_key * width if width else from_key
        for rank, cell in self._cells():
            if cell.step < least:
                continue
            column = columns.setdefault(cell.step // width if width else cell.step, {})
            if rank in column:
                column[rank].merge(cell.seen())
            else:
                column[rank] = cell.seen()
        return columns

    def _cells(self) -> Iterator[tuple[int, Any]]:
        for rank, series in self._ranks.items():
            for cell in series.cells.values():
                yield rank, cell

    @property
    def reached(self) -> float:
        """The highest step that all its ranks have reached."""
        living = [series.reached for rank, series in self._ranks.items() if rank not in self._gone]
        return min(living) if living else max(series.reached for series in self._ranks.values())

    @property
    def _began(self) -> float:
        return min(series.began for series in self._ranks.values())

    def _exact(self, step: float) -> Point:
        """The mean over those ranks that have a value at this very step."""
        values = [value for series in self._ranks.values() if (value := series.at(step)) is not None]
        return point_of([Span(step, value) for value in values]) if values else Point(step, None, None, None, 0)

    @property
    def ends(self) -> tuple[float, float] | None:
        """The first step, and the last one that all ranks have reached."""
        return (self._began, self.reached) if self._ranks else None

    @property
    def last(self) -> Point | None:
        """The newest step that all ranks have reached."""
        if not self._ranks:
            return None
        exact = self._exact(self.reached)
        return exact if exact.num_ranks else self.points(8)[-1]

    # --- what is said beside it ---

    @property
    def logged_by(self) -> Set[int]:
        """The ranks that have logged it."""
        return self._ranks.keys()

    @property
    def ranks(self) -> dict[int, Extreme]:
        """The value of each rank: at the newest step that all have reached, else its own newest one."""
        end, found = self.reached if self._ranks else 0.0, {}
        for rank, series in sorted(self._ranks.items()):
            for step in (end, series.reached):
                if (value := series.at(step)) is not None:
                    found[rank] = Extreme(step, value)
                    break
        return found

    @property
    def behind(self) -> list[int]:
        """The ranks that the chart waits for, when others are far ahead."""
        if not self._ranks or max(series.num_after(self.reached) for series in self._ranks.values()) < FAR_AHEAD:
            return []
        living = {rank: series for rank, series in self._ranks.items() if rank not in self._gone}
        return sorted(rank for rank, series in living.items() if series.reached == self.reached)

    @property
    def lowest(self) -> Extreme | None:
        """The lowest value of any rank."""
        seen = [cell.seen() for _, cell in self._cells()]
        found = min((one for one in seen if one.count), key=lambda one: (one.low, one.low_at), default=None)
        return Extreme(found.low_at, found.low) if found is not None else None

    @property
    def highest(self) -> Extreme | None:
        """The highest value of any rank."""
        seen = [cell.seen() for _, cell in self._cells()]
        found = max((one for one in seen if one.count), key=lambda one: (one.high, -one.high_at), default=None)
        return Extreme(found.high_at, found.high) if found is not None else None

    @property
    def num_not_finite(self) -> int:
        """How many values were NaN or infinite."""
        return self.not_finite.count

    @property
    def first_not_finite(self) -> float | None:
        """The first step with such a value."""
        return self.not_finite.first


def point_of(seen: Iterable[Span]) -> Point:
    """A column of a chart. Where one rank has nothing but NaN, there is no mean over ranks."""
    ranks = list(seen)
    where = (min(one.first for one in ranks) + max(one.last for one in ranks)) / 2
    step = ranks[0].first if len(ranks) == 1 and ranks[0].first == ranks[0].last else where
    num_not_finite = sum(one.num_not_finite for one in ranks)
    newest = max(ranks, key=lambda one: (one.last, one.time))
    if not all(one.count for one in ranks):
        return Point(step, None, None, None, len(ranks), num_not_finite, newest.time, newest.epoch)
    mean = math.fsum(one.mean / len(ranks) for one in ranks)
    low, high = min(one.low for one in ranks), max(one.high for one in ranks)
    return Point(step, mean, low, high, len(ranks), num_not_finite, newest.time, newest.epoch)


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
        self._steps: dict[int, StepCount] = {}
        self._epochs: dict[int, float] = {}  # the newest of each rank
        self._gone: set[int] = set()

    def feed(self, rank: int, records: Iterable[Mapping[str, Any]], now: float = 0.0) -> bool:
        """Take in records of one rank; True when anything was new. `now` stands in for a missing `t`."""
        changed = False
        for record in records:
            if self._is_new(rank, record):
                self.num_records += 1
                changed = True
                self._take(rank, record, now)
        return changed

    def leave(self, rank: int) -> None:
        """A rank has gone, or has ended its cell: what others have reached does not wait for it."""
        self._gone.add(rank)

    def join(self, rank: int) -> None:
        """A rank is there (again)."""
        self._gone.discard(rank)

    def end(self) -> None:
        """The run is over: no rank logs anything any more."""
        self._gone.update(self._steps)

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
            if rank not in self._steps:
                self._steps[rank] = StepCount()
            step = self._steps[rank].of(record)
            if (epoch := values.get("epoch")) is not None and math.isfinite(epoch := as_number(epoch) or 0.0):
                self._epochs[rank] = epoch
            time = record.get("t", now)
            for name, value in values.items():
                self._take_value(str(name), step, value, rank, time)
        if progress := record.get("progress"):
            self._take_progress(rank, progress, str(record.get("desc") or ""), record.get("t", now))

    def _take_progress(self, rank: int, progress: Sequence[Any], desc: str, now: float) -> None:
        done, total = (None if part is None else as_number(part) for part in (*progress, None)[:2])
        if done is not None and math.isfinite(done):
            total = total if total and math.isfinite(total) and total > 0 else None
            self.progress.move(rank, done, total, desc, now)

    def _take_value(self, name: str, step: float, value: Any, rank: int, time: float) -> None:
        number = as_number(value)
        if number is None:
            return
        series = self.series.get(name)
        if series is None:
            if len(self.series) >= self.max_metrics:
                self.num_left_out += 1
                return
            series = self.series[name] = Series(name, self.max_points, self._gone)
        series.add(step, number, rank, time=time, epoch=self._epochs.get(rank))
