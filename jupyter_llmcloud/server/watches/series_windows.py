"""Windows of a metric: a stretch of its steps as so many columns. The values stay in memory for the next window."""

from __future__ import annotations

import asyncio
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.protocol.http.series import SeriesColumns, SeriesQuery, SeriesWindow
from jupyter_llmcloud.storage.metric_columns import RankColumn, RecordedMetric
from jupyter_llmcloud.storage.runs import RunFolder

MAX_VALUES = 8_000_000  # of all metrics that are kept; a value takes 24 bytes

Ranks = Sequence[tuple[RankColumn, RankColumn]]  # (values, epochs)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one rank has in one column."""

    count: int
    mean: float
    low: float
    high: float
    num_not_finite: int
    last: int  # index of the last value


class SeriesWindows:
    """Of all runs of a server; what was asked for last stays in memory."""

    def __init__(self, max_values: int = MAX_VALUES) -> None:
        self._max_values = max_values
        self._kept: dict[tuple[str, str], RecordedMetric] = {}
        self._guard = asyncio.Lock()

    async def window(self, folder: RunFolder, asked: SeriesQuery) -> SeriesWindow:
        """A stretch of a metric. Raises NotFound when the run has not logged it."""
        async with self._guard:
            return await asyncio.to_thread(self._make, folder, asked)

    def _make(self, folder: RunFolder, asked: SeriesQuery) -> SeriesWindow:
        key = (folder.run_id, asked.metric)
        kept = self._kept.pop(key, None) or RecordedMetric(folder, asked.metric)
        kept.read_on()
        if not (ranks := kept.ranks):
            raise NotFound(f"run {folder.run_id!r} has logged no metric {asked.metric!r}.")
        self._kept[key] = kept
        self._let_go()
        return SeriesWindow(metric=asked.metric, by=asked.by, columns=_columns(ranks, asked))

    @property
    def num_values(self) -> int:
        """In memory."""
        return sum(kept.num_values for kept in self._kept.values())

    def _let_go(self) -> None:
        while len(self._kept) > 1 and self.num_values > self._max_values:
            del self._kept[next(iter(self._kept))]


def _columns(ranks: dict[int, tuple[RankColumn, RankColumn]], asked: SeriesQuery) -> dict[str, SeriesColumns]:
    low = -math.inf if asked.from_ is None else asked.from_
    high = math.inf if asked.to is None else asked.to
    groups = {"mean": list(ranks.values())} if asked.by == "mean" else {str(r): [ranks[r]] for r in sorted(ranks)}
    return {name: window(group, low, high, asked.points) for name, group in groups.items()}


def window(ranks: Ranks, low: float, high: float, points: int) -> SeriesColumns:
    """The steps from `low` to `high` over these ranks, as at most `points` columns."""
    ranges = [column.between(low, high) for column, _ in ranks]
    edges, is_exact = _edges(ranks, ranges, points)
    rows = SeriesColumns(
        step=[], time=[], epoch=[], mean=[], low=[], high=[], n=[], not_finite=[], is_exact=is_exact
    )  # fmt: skip
    slices = [_slices(column.steps, begin, end, edges) for (column, _), (begin, end) in zip(ranks, ranges, strict=True)]
    for bounds in zip(*slices, strict=True):
        seen = [
            (column, epochs, _seen(column.values, begin, end))
            for (column, epochs), (begin, end) in zip(ranks, bounds, strict=True)
            if end > begin
        ]
        if seen:
            firsts = [
                column.steps[begin] for (column, _), (begin, end) in zip(ranks, bounds, strict=True) if end > begin
            ]
            _append(rows, min(firsts), seen)
    return rows


def _edges(ranks: Ranks, ranges: Sequence[tuple[int, int]], points: int) -> tuple[list[float], bool]:
    """The steps at which columns end (the last one excluded), and whether each holds one step."""
    filled = [(column, begin, end) for (column, _), (begin, end) in zip(ranks, ranges, strict=True) if end > begin]
    if not filled:
        return [], True
    if max(end - begin for _, begin, end in filled) <= points:
        steps = sorted({step for column, begin, end in filled for step in column.steps[begin:end]})
        if len(steps) <= points:
            return steps[1:], True
    first = min(column.steps[begin] for column, begin, _ in filled)
    last = max(column.steps[end - 1] for column, _, end in filled)
    width = (last - first) / points
    return [first + number * width for number in range(1, points)], False


def _slices(steps: array[float], begin: int, end: int, edges: Sequence[float]) -> Iterator[tuple[int, int]]:
    """The range of indices in each column: those before the first edge, those from it on before the second, ..."""
    at = begin
    for edge in edges:
        after = bisect_left(steps, edge, at, end)
        yield at, after
        at = after
    yield at, end


def _seen(values: array[float], begin: int, end: int) -> _Seen:
    if end - begin == 1:
        value = values[begin]
        is_finite = math.isfinite(value)
        return _Seen(int(is_finite), value, value, value, int(not is_finite), begin)
    part: Sequence[float] = values[begin:end]
    total = sum(part)
    num_not_finite = 0
    if not math.isfinite(total):
        part = [value for value in part if math.isfinite(value)]
        num_not_finite = end - begin - len(part)
        if not part:
            return _Seen(0, math.nan, math.nan, math.nan, num_not_finite, end - 1)
        return _Seen(len(part), _mean(part), min(part), max(part), num_not_finite, end - 1)
    return _Seen(len(part), total / len(part), min(part), max(part), 0, end - 1)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(value / len(values) for value in values)


def _append(rows: SeriesColumns, first: float, seen: Sequence[tuple[RankColumn, RankColumn, _Seen]]) -> None:
    newest, epochs, at = max(seen, key=lambda row: row[0].steps[row[2].last])
    last = newest.steps[at.last]
    rows.step.append(first if first == last else (first + last) / 2)
    rows.time.append(newest.times[at.last])
    rows.epoch.append(epochs.at(last))
    found = [one for _, _, one in seen]
    is_whole = all(one.count for one in found)  # where a rank has nothing but NaN, there is no mean over ranks
    rows.mean.append(_mean([one.mean for one in found]) if is_whole else None)
    rows.low.append(min(one.low for one in found) if is_whole else None)
    rows.high.append(max(one.high for one in found) if is_whole else None)
    rows.n.append(len(found))
    rows.not_finite.append(sum(one.num_not_finite for one in found))
