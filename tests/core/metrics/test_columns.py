"""Columns that are kept up to date are those that the whole series would give; who has the tail has everything."""

from __future__ import annotations

import math
import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from jupyter_llmcloud.core.metrics.columns import Columns, MetricColumns
from jupyter_llmcloud.core.metrics.series import MetricCollector, Point, Series

LIMIT = 20


def whole(series: Series) -> Columns:
    columns = Columns(series, LIMIT)
    columns.update(-math.inf)
    return columns


def plain(point: Point) -> tuple[object, ...]:
    """Its mean without the digits that depend on the order of sums."""
    mean = None if point.mean is None else round(point.mean, 9)
    return point.step, mean, point.low, point.high, point.num_ranks, point.num_not_finite, point.time, point.epoch


@settings(max_examples=60)
@example(7, 2, 2)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 400))
def test_a_front_end_that_replaces_tails_has_what_the_whole_series_gives(seed: int, num_ranks: int, steps: int) -> None:
    chance = random.Random(seed)
    series, kept, shown = Series("loss"), None, []
    at = [0] * num_ranks
    for _ in range(steps):
        for _ in range(chance.randint(1, 5)):
            rank = chance.randrange(num_ranks)
            at[rank] = max(0, at[rank] + (1 if chance.random() < 0.97 else -chance.randint(1, 10)))
            value = math.nan if chance.random() < 0.05 else chance.random()
            series.add(at[rank], value, rank, time=float(at[rank]))
        kept = kept or Columns(series, LIMIT)
        first = kept.update(series.dirty_from)
        series.dirty_from = math.inf
        shown = shown[:first] + kept.points[first:]
    assert kept is not None
    assert shown == kept.points
    assert [plain(point) for point in shown] == [plain(point) for point in whole(series).points]
    assert len(shown) <= LIMIT


def test_a_value_at_the_end_changes_no_column_before_it() -> None:
    series = Series("loss")
    for step in range(10):
        series.add(step, float(step))
    columns = whole(series)
    series.dirty_from = math.inf
    series.add(10, 10.0)
    assert columns.update(series.dirty_from) == 10
    assert columns.update(math.inf) == 11


def test_a_column_that_another_rank_has_joined_is_another_one_also_where_it_is_not_finite() -> None:
    series = Series("loss")
    series.add(1, math.nan, 0)
    columns = whole(series)
    series.dirty_from = math.inf
    series.add(1, math.nan, 1)
    assert columns.update(series.dirty_from) == 0
    assert columns.points[0].num_ranks == 2


def test_time_and_epoch_of_a_column_are_those_of_its_last_value() -> None:
    metrics = MetricCollector()
    metrics.feed(0, [{"t": 100.0 + n, "step": n, "values": {"loss": 1.0, "epoch": n / 4}} for n in range(100)])
    metrics.feed(1, [{"t": 200.0 + n, "step": n, "values": {"loss": 1.0}} for n in range(100)])
    points = whole(metrics.series["loss"]).points
    assert points[-1].time == 299.0 and points[-1].epoch is None
    assert whole(metrics.series["epoch"]).points[-1].epoch == 99 / 4


def test_each_front_end_gets_what_it_lacks() -> None:
    metrics = MetricCollector()
    columns = MetricColumns(metrics, LIMIT)

    def log(name: str, step: int) -> None:
        metrics.feed(0, [{"step": step, "values": {name: 1.0}}])
        columns.dirty(name, step)

    for step in range(5):
        log("a", step)
    columns.update()
    early = columns.version
    assert [(name, first) for name, first, _ in columns.since(0)] == [("a", 0)]
    log("b", 0)
    log("a", 5)
    columns.update()
    assert [(name, first) for name, first, _ in columns.since(early)] == [("a", 5), ("b", 0)]
    assert columns.since(columns.version) == []


def test_who_is_far_behind_gets_the_whole_series() -> None:
    metrics = MetricCollector()
    columns = MetricColumns(metrics, LIMIT)
    versions = []
    for step in range(15):
        for again in range(10):
            metrics.feed(0, [{"step": step, "values": {"a": float(again)}}])
            columns.dirty("a", step)
            columns.update()
            versions.append(columns.version)
    assert columns.since(versions[3])[0][1] == 0
    assert columns.since(versions[-2])[0][1] == 14
