"""Series and progress: records in, values out."""

from __future__ import annotations

import math
import random
import time

import pytest

from jupyter_llmcloud.core.metrics.not_finite import NotFiniteLog
from jupyter_llmcloud.core.metrics.progress import Bar, Progress
from jupyter_llmcloud.core.metrics.series import Extreme, MetricCollector, Point, Series


def record(seq, step=None, **values):
    return {"seq": seq, "t": float(seq), "step": step, "values": values}


def progress(seq, done, total, t, desc=""):
    return {"seq": seq, "t": t, "progress": [done, total], "desc": desc}


def test_a_point_is_the_mean_over_ranks_with_the_spread():
    collector = MetricCollector()
    collector.feed(0, [record(1, 10, loss=2.0)])
    collector.feed(1, [record(1, 10, loss=4.0)])
    assert collector.series["loss"].points() == [Point(10, 3.0, 2.0, 4.0)]


def test_a_slow_rank_finds_its_step_however_late_it_comes():
    collector = MetricCollector()
    collector.feed(0, [record(n, n, loss=float(n)) for n in range(1, 6)])
    collector.feed(1, [record(n, n, loss=float(n) + 1) for n in range(1, 6)])
    assert [point.mean for point in collector.series["loss"].points()] == [1.5, 2.5, 3.5, 4.5, 5.5]


def test_the_order_in_which_ranks_arrive_changes_nothing():
    streams = {rank: [record(n + 1, n, loss=math.sin(n) + rank) for n in range(400)] for rank in range(3)}
    in_turn, shuffled = MetricCollector(), MetricCollector()
    for rank, records in streams.items():
        in_turn.feed(rank, records)
    heads = {rank: iter(records) for rank, records in streams.items()}
    choose = random.Random(7)
    while heads:
        rank = choose.choice(sorted(heads))
        item = next(heads[rank], None)
        if item is None:
            del heads[rank]
        else:
            shuffled.feed(rank, [item])
    first, second = in_turn.series["loss"].points(), shuffled.series["loss"].points()
    assert [point.step for point in first] == [point.step for point in second]
    assert [point.mean for point in first] == pytest.approx([point.mean for point in second])


def test_duplicates_and_records_from_the_past_are_ignored():
    collector = MetricCollector()
    assert collector.feed(0, [record(1, 1, loss=1.0), record(2, 2, loss=2.0)])
    assert not collector.feed(0, [record(2, 2, loss=9.0), record(1, 1, loss=9.0)])
    assert [point.mean for point in collector.series["loss"].points()] == [1.0, 2.0]


def test_the_same_seq_of_another_rank_is_not_a_duplicate():
    collector = MetricCollector()
    collector.feed(0, [record(1, 1, loss=1.0)])
    assert collector.feed(1, [record(1, 1, loss=3.0)])
    assert collector.series["loss"].points() == [Point(1, 2.0, 1.0, 3.0)]


def test_records_without_a_step_are_placed_by_their_order():
    collector = MetricCollector()
    collector.feed(0, [record(1, loss=5.0), progress(2, 1, 9, 1.0), record(3, loss=4.0)])
    assert [(point.step, point.mean) for point in collector.series["loss"].points()] == [(1, 5.0), (2, 4.0)]


def test_values_that_are_not_finite_are_gaps_and_are_counted():
    collector = MetricCollector()
    values = [1.0, math.nan, math.inf, None, 2.0]
    collector.feed(0, [record(n + 1, n, loss=value) for n, value in enumerate(values)])
    series = collector.series["loss"]
    assert [point.mean for point in series.points()] == [1.0, None, None, None, 2.0]
    assert (series.num_not_finite, series.first_not_finite, series.num_values) == (3, 1, 5)


def test_the_last_value_of_a_rank_at_a_step_counts():
    collector = MetricCollector()
    for rank in (0, 1):
        collector.feed(rank, [record(1, 16, eval_loss=0.05), record(2, 16, eval_loss=0.003 + rank * 0.002)])
    series = collector.series["eval_loss"]
    assert series.points() == [Point(16, 0.004, 0.003, 0.005)]
    assert (series.lowest, series.highest) == (Extreme(16, 0.003), Extreme(16, 0.005))
    assert series.ranks == {0: Extreme(16, 0.003), 1: Extreme(16, 0.005)}


@pytest.mark.parametrize("num_steps", [100, 5_000], ids=["exact", "thinned"])
def test_a_rank_that_goes_back_replaces_what_it_had_said(num_steps):
    series = Series("loss")
    for step in range(num_steps):
        series.add(step, 9.0)
    for step in range(num_steps // 2, num_steps):
        series.add(step, 1.0)
    points = series.points()
    assert {point.mean for point in points if point.step < num_steps / 3} == {9.0}
    assert {point.mean for point in points if point.step > 2 * num_steps / 3} == {1.0}


def test_a_mean_is_drawn_only_for_steps_that_all_its_ranks_have_reached():
    collector = MetricCollector()
    collector.feed(0, [record(n, n, loss=1.0) for n in range(1, 9)])
    collector.feed(1, [record(n, n, loss=3.0) for n in range(1, 4)])
    series = collector.series["loss"]
    assert [(point.step, point.mean, point.num_ranks) for point in series.points()] == [(n, 2.0, 2) for n in (1, 2, 3)]
    assert (series.last, series.last.num_ranks, series.ends) == (Point(3, 2.0, 1.0, 3.0), 2, (1, 3))
    collector.feed(1, [record(n, n, loss=3.0) for n in range(4, 9)])
    assert [point.mean for point in series.points()] == [2.0] * 8


def test_a_long_mean_waits_for_its_slowest_rank_and_its_last_point_is_exact():
    collector = MetricCollector()
    collector.feed(0, [record(n, n, loss=float(n)) for n in range(1, 5_001)])
    collector.feed(1, [record(n, n, loss=float(n) + 2) for n in range(1, 4_981)])
    series = collector.series["loss"]
    assert series.points()[-1] == series.last == Point(4_980, 4_981.0, 4_980.0, 4_982.0)
    assert all(point.num_ranks == 2 for point in series.points())
    assert series.behind == [1]


def test_a_rank_that_has_gone_holds_nothing_up_and_one_that_never_logs_neither():
    collector = MetricCollector()
    for rank, last in ((0, 50), (1, 50), (2, 7)):
        collector.feed(rank, [record(n, n, loss=float(rank)) for n in range(1, last + 1)])
    collector.feed(3, [progress(1, 1, 100, 0.0), record(2, 1, other=1.0)])
    series = collector.series["loss"]
    assert (series.reached, series.behind) == (7, [2])
    collector.leave(2)
    assert (series.reached, series.behind) == (50, [])
    points = series.points()
    assert [points[6].mean, points[6].num_ranks, points[7].mean, points[7].num_ranks] == [1.0, 3, 0.5, 2]
    collector.join(2)
    assert series.reached == 7
    for rank in range(4):
        collector.leave(rank)
    assert series.reached == 50


def test_where_one_rank_is_nan_there_is_no_mean_over_ranks():
    collector = MetricCollector()
    collector.feed(0, [record(1, 1, loss=1.0), record(2, 2, loss=1.0)])
    collector.feed(1, [record(1, 1, loss=1.0), record(2, 2, loss=math.nan)])
    assert collector.series["loss"].points() == [Point(1, 1.0, 1.0, 1.0), Point(2, None, None, None)]
    assert collector.series["loss"].not_finite.ranks == [1]


def test_a_lone_nan_among_thousands_of_steps_is_still_marked():
    series = Series("loss")
    for step in range(20_000):
        series.add(step, math.nan if step == 7_777 else 1.0)
    marked = [point for point in series.points(160) if point.num_not_finite]
    assert [(point.mean, point.num_not_finite) for point in marked] == [(1.0, 1)]
    assert abs(marked[0].step - 7_777) < 200


@pytest.mark.parametrize(
    ("values", "count", "first", "since", "ranks"),
    [
        ([1.0, math.nan, math.inf, 2.0], 2, 1, 1, []),
        ([1.0, math.nan, 2.0, math.nan, math.nan], 3, 1, 3, [0]),
        ([math.nan] * 3, 3, 0, 0, [0]),
        ([1.0, 2.0], 0, None, None, []),
    ],
    ids=["a while", "again", "always", "never"],
)
def test_it_is_known_how_many_values_were_not_finite_and_since_when(values, count, first, since, ranks):
    series = Series("loss")
    for step, value in enumerate(values):
        series.add(step, value)
    found = series.not_finite
    assert (found.count, found.first, found.since, found.ranks) == (count, first, since, ranks)


def test_a_nan_that_another_value_at_its_step_replaces_was_none():
    log = NotFiniteLog()
    log.take(0, [record(1, 1, loss=math.nan), record(2, 2, loss=1.0)])
    log.take(0, [record(3, 16, loss=math.nan), record(4, 16, loss=0.5), record(5, 17, other=math.nan)])
    log.take(1, [record(1, 5, other=math.inf)])
    assert log.summary() == {
        "loss": {"count": 1, "first": 1, "since": 1},
        "other": {"count": 2, "first": 5, "since": 5},
    }


def test_another_leader_of_a_run_goes_on_counting():
    log = NotFiniteLog({"loss": {"count": 2, "first": 10, "since": 11}, "old": {"count": 1, "first": 1, "since": 1}})
    log.take(0, [record(1, 30, loss=math.inf)])
    assert log.summary() == {
        "loss": {"count": 3, "first": 10, "since": 30},
        "old": {"count": 1, "first": 1, "since": 1},
    }


def test_the_values_of_many_ranks_take_bounded_memory():
    collector = MetricCollector()
    for rank in range(100):
        collector.feed(rank, [record(n, n, loss=1.0) for n in range(1, 600)])
    cells = sum(len(series.cells) for series in collector.series["loss"]._ranks.values())
    assert cells < 30_000 and len(collector.series["loss"].points()) > 50


def test_a_newest_value_that_is_not_finite_is_not_hidden_by_an_older_one():
    collector = MetricCollector()
    collector.feed(0, [record(1, 1, loss=1.0), record(2, 2, loss=math.nan)])
    assert collector.series["loss"].last == Point(2, None, None, None)


def test_what_is_no_number_is_left_out():
    collector = MetricCollector()
    collector.feed(0, [record(1, 1, loss=1.0, note="hello", shape=[1, 2], flag=True, huge=10**400)])
    assert list(collector.series) == ["loss", "flag", "huge"]
    assert collector.series["flag"].last == Point(1, 1, 1, 1)
    assert collector.series["huge"].num_not_finite == 1


def test_a_long_series_stays_bounded_and_keeps_its_ends_and_extremes():
    series = Series("loss")
    for step in range(100_000):
        series.add(step, 50.0 if step == 33_333 else 1 + step / 100_000)
    points = series.points()
    assert 200 <= len(points) <= 500
    assert points[0] == Point(0, 1.0, 1.0, 1.0)
    assert points[-1] == Point(99_999, 1.99999, 1.99999, 1.99999)
    assert max(point.high for point in points) == 50.0
    assert (series.lowest, series.highest) == (Extreme(0, 1.0), Extreme(33_333, 50.0))
    assert [point.step for point in points] == sorted(point.step for point in points)


def test_a_chart_asks_for_fewer_points_and_gets_the_same_ends():
    series = Series("loss")
    for step in range(3_000):
        series.add(step, float(step))
    points = series.points(100)
    assert 40 <= len(points) <= 100
    assert (points[0].mean, points[-1].mean) == (0.0, 2_999.0)


@pytest.mark.parametrize("scale", [0.001, 1, 100, 1e9], ids=str)
def test_thinning_follows_the_scale_of_the_steps(scale):
    series = Series("loss")
    for step in range(2_000):
        series.add(step * scale, 1.0)
    assert 200 <= len(series.points()) <= 500


def test_an_outlier_among_the_steps_does_not_swallow_the_rest():
    series = Series("loss")
    series.add(1e12, 1.0)
    for step in range(2_000):
        series.add(step, 1.0)
    assert len(series.points()) > 200


@pytest.mark.alone
def test_a_record_costs_the_same_however_long_the_run_is():
    series = Series("loss")

    def cost(first, count=40_000):
        began = time.process_time()
        for step in range(first, first + count):
            series.add(step, 1.0)
        return time.process_time() - began

    early = cost(0)
    for decade in range(1, 4):
        cost(decade * 40_000)
    assert cost(200_000) < 3 * early + 0.1


def test_means_of_huge_values_do_not_overflow():
    series = Series("loss")
    for value in (1.7e308, 1.7e308, -1.7e308):
        series.add(1, value)
    assert math.isfinite(series.last.mean)


def test_the_number_of_metrics_is_bounded_and_the_rest_counted():
    collector = MetricCollector(max_metrics=3)
    collector.feed(0, [record(1, 1, **{f"m{n}": 1.0 for n in range(5)})])
    assert list(collector.series) == ["m0", "m1", "m2"]
    assert collector.num_left_out == 2


def test_progress_knows_its_rate_and_the_time_left():
    collector = MetricCollector()
    collector.feed(0, [progress(n + 1, n * 10, 200, float(n)) for n in range(11)])
    (bar,) = collector.progress.shown()
    assert (bar.done, bar.fraction) == (100, 0.5)
    assert bar.rate == pytest.approx(10.0)
    assert bar.eta(10.0) == pytest.approx(10.0)
    assert bar.eta(14.0) == pytest.approx(6.0)
    assert bar.eta(99.0) == 0.0


def test_the_rate_follows_a_change_of_pace():
    bar = Bar(10_000)
    for second in range(60):
        bar.move(0, second * 10, "", float(second))
    for second in range(60):
        bar.move(0, 590 + second, "", 59.0 + second)
    assert 1.0 <= bar.rate < 1.5


def test_progress_of_several_ranks_is_that_of_the_slowest():
    bar = Bar(100)
    for rank, done in ((0, 10), (1, 4), (0, 20), (1, 15)):
        bar.move(rank, done, "", 1.0)
    assert bar.done == 15


def test_a_bar_that_goes_backwards_begins_anew():
    bar = Bar(10)
    for second in range(11):
        bar.move(0, second, "", float(second))
    bar.move(0, 0, "", 11.0)
    assert (bar.done, bar.is_complete, bar.rate) == (0, False, None)


def test_nested_bars_are_shown_outer_first():
    bars = Progress()
    bars.move(0, 0, 3, "epochs", 0.0)
    bars.move(0, 5, 100, "steps", 1.0)
    assert [bar.desc for bar in bars.shown()] == ["epochs", "steps"]
    bars.move(0, 100, 100, "steps", 2.0)
    assert [bar.desc for bar in bars.shown()] == ["epochs"]


def test_a_changing_description_is_still_the_same_bar():
    bars = Progress()
    for step in range(50):
        bars.move(0, step, 100, f"loss {step}", float(step))
    assert [(bar.desc, bar.done) for bar in bars.shown()] == [("loss 49", 49)]


def test_the_number_of_bars_is_bounded_and_a_running_one_is_kept():
    bars = Progress()
    bars.move(0, 1, 1000, "train", 0.0)
    for total in range(1, 100):
        bars.move(0, total, total, "", float(total))
    assert [bar.desc for bar in bars.shown()] == ["train"]


def test_a_bar_without_a_total_counts_without_a_fraction():
    bars = Progress()
    bars.move(0, 5, None, "", 0.0)
    bars.move(0, 15, 0, "", 1.0)
    (bar,) = bars.shown()
    assert (bar.done, bar.fraction, bar.eta(1.0), bar.rate) == (15, None, None, 10.0)


def test_malformed_progress_is_ignored():
    collector = MetricCollector()
    collector.feed(0, [progress(1, math.nan, 10, 0.0), progress(2, None, 10, 0.0), {"seq": 3, "progress": []}])
    assert collector.progress.shown() == []
