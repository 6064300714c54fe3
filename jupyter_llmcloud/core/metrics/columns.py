"""The columns of a chart, kept up to date at the cost of what is new.

A `Series` can be asked for its points at any time; that costs as much as it holds. Who shows it ten times a second
keeps `Columns` of it, which look only at the columns that something was logged to since, and tell from where on they
have changed: a front end replaces the tail of what it has.
"""

from __future__ import annotations

import math
from collections import deque
from operator import attrgetter

from jupyter_llmcloud.core.metrics.series import MetricCollector, Point, Series, point_of

# All that a front end is sent of a column; points compare by less.
_shown = attrgetter("step", "mean", "low", "high", "num_ranks", "num_not_finite", "time", "epoch")
MAX_CHANGES = 64  # of each series; who knows it as it was before them gets all of it


class Columns:
    """Of one series, `limit` at most.

    Attributes:
        points: one a column, in order of their steps, as far as all ranks have reached.
        is_partial: whether ranks are behind, so that values are known beyond the last column.
    """

    def __init__(self, series: Series, limit: int) -> None:
        self.points: list[Point] = []
        self.is_partial = False
        self._series = series
        self._limit = limit
        self._width = -1.0
        self._seen: dict[float, tuple[float, Point]] = {}  # by key: the last step in it, and what it shows
        self._keys: list[float] = []
        self._ranks: set[int] = set()

    @property
    def ranks(self) -> list[int]:
        """Those that log it."""
        return sorted(self._series.logged_by)

    def update(self, dirty_from: float) -> int:
        """Take in what was logged at steps from `dirty_from` on; returns the index of the first column that changed.

        When none has, that is their number.
        """
        series, before = self._series, self.points
        width = series.column_width(self._limit)
        first = dirty_from // width if width and math.isfinite(dirty_from) else dirty_from
        if width != self._width or series.logged_by != self._ranks:
            self._width, self._ranks, first = width, set(series.logged_by), -math.inf
            self._seen = {}
        for key, ranks in series.columns(width, first).items():
            self._seen[key] = (max(one.last for one in ranks.values()), point_of(ranks.values()))
        self._keys = sorted(self._seen)
        end = series.reached if self._keys else 0.0
        self.points = [self._seen[key][1] for key in self._keys if self._seen[key][0] <= end]
        self.is_partial = len(self.points) < len(self._keys)
        return _first_difference(before, self.points)


class MetricColumns:
    """The columns of all series of a run, for any number of front ends that know different versions of them.

    Attributes:
        version: the number of the newest change.
    """

    def __init__(self, metrics: MetricCollector, limit: int) -> None:
        self.version = 0
        self._metrics = metrics
        self._limit = limit
        self._columns: dict[str, Columns] = {}
        self._changes: dict[str, deque[tuple[int, int]]] = {}  # (version, index of the first column that changed)
        self._dirty: dict[str, float] = {}

    def dirty(self, name: str, from_step: float) -> None:
        """Something was logged to a series, at steps from this one on; infinity: ranks have come or gone."""
        self._dirty[name] = min(from_step, self._dirty.get(name, math.inf))

    def update(self) -> None:
        """Bring the columns of what is dirty up to date."""
        dirty, self._dirty = self._dirty, {}
        for name, from_step in dirty.items():
            if name not in self._columns:
                self._columns[name] = Columns(self._metrics.series[name], self._limit)
                self._changes[name] = deque(maxlen=MAX_CHANGES)
            columns = self._columns[name]
            before, was_partial = len(columns.points), columns.is_partial
            first = columns.update(from_step)
            after = len(columns.points)
            if first < after or before != after or was_partial != columns.is_partial:
                self.version += 1
                self._changes[name].append((self.version, first))

    def since(self, version: int) -> list[tuple[str, int, Columns]]:
        """(metric, index from which its columns are other ones, its columns) of each that changed after a version."""
        found = []
        for name, changes in self._changes.items():
            if not changes or changes[-1][0] <= version:
                continue
            is_known = version and (len(changes) < MAX_CHANGES or changes[0][0] <= version)
            first = min(at for changed, at in changes if changed > version) if is_known else 0
            found.append((name, first, self._columns[name]))
        return found


def _first_difference(before: list[Point], after: list[Point]) -> int:
    shorter = min(len(before), len(after))
    for at in range(shorter):
        old, new = before[at], after[at]
        if old is not new and _shown(old) != _shown(new):
            return at
    return shorter
