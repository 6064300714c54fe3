"""What a chart shows, by values: ranges, ticks, what lies outside, where marks are."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_llmcloud.core.metrics.axes import Axis, plan
from jupyter_llmcloud.core.metrics.series import Point

numbers = st.floats(-1e300, 1e300, allow_nan=False) | st.integers(-(10**9), 10**9).map(float)


def points(values: list[float | None], steps: list[float] | None = None) -> list[Point]:
    return [Point(n if steps is None else steps[n], value, value, value) for n, value in enumerate(values)]


def texts(axis: Axis | None) -> list[str]:
    assert axis is not None
    return [text for _, text in axis.ticks]


def test_steps_are_whole_numbers_where_the_logged_ones_are() -> None:
    assert texts(plan(points([1.0, 2.0, 3.0])).steps) == ["0", "1", "2"]
    assert texts(plan(points([1.0, 2.0], [7, 8])).steps) == ["7", "8"]
    assert texts(plan(points([1.0, 2.0], [0, 7])).steps) == ["0", "2", "4", "6"]
    assert texts(plan(points([1.0])).steps) == ["0", "1"]
    assert texts(plan(points([1.0, 2.0], [0.25, 1.0])).steps) == ["0.4", "0.6", "0.8", "1"]


def test_the_text_of_a_tick_is_its_value() -> None:
    assert texts(plan(points([0.3, 0.31])).values) == ["0.3", "0.3025", "0.305", "0.3075", "0.31"]
    assert texts(plan(points([2.300001, 2.300002])).values)[:2] == ["2.300001", "2.30000125"]


@settings(max_examples=400)
@given(values=st.lists(numbers, min_size=1, max_size=20), begin=st.integers(0, 10**9), gap=st.integers(1, 10**6))
def test_every_axis_has_two_ticks_or_more_inside_and_told_apart(values: list[float], begin: int, gap: int) -> None:
    shown = plan(points(values, [begin + gap * n for n in range(len(values))]))
    for axis in (shown.steps, shown.values, *([shown.log] if shown.log else [])):
        assert len(axis.ticks) >= 2
        assert len(set(texts(axis))) == len(axis.ticks)
        slack = 1e-9 * max(abs(axis.low), abs(axis.high))
        assert all(axis.low - slack <= value <= axis.high + slack for value, _ in axis.ticks)
    assert all(value == int(value) for value, _ in shown.steps.ticks)


def test_a_rare_value_does_not_flatten_the_curve_and_is_said() -> None:
    curve = [2.0 + 0.1 * math.sin(n) for n in range(100)]
    calm = plan(points(curve))
    spiked = plan(points([*curve[:50], 1204.0, *curve[50:]]))
    assert calm.outside == "" and spiked.outside == "up to 1,204 above"
    assert spiked.values.high < 2.5 and spiked.values.low < 1.9
    assert plan(points([*curve, -50.0])).outside == "down to -50 below"
    assert spiked.log is not None and spiked.log.high > 1204


@pytest.mark.parametrize(
    "values",
    [[8.0 * math.exp(-n / 40) for n in range(160)], [0.0, 0.0, 100.0], [1.0] * 99 + [2.0], [5.0, 4.0, 3.0, 99.0]],
    ids=["a falling loss", "three", "a step", "four"],
)
def test_an_ordinary_curve_is_shown_whole(values: list[float]) -> None:
    shown = plan(points(list(values)))
    assert shown.outside == ""
    assert shown.values.low < min(values) and shown.values.high > max(values)


def test_a_scale_of_powers_is_offered_for_what_is_above_zero() -> None:
    assert texts(plan(points([1e-3, 1.0, 100.0])).log) == ["0.001", "0.1", "10"]
    assert texts(plan(points([1.0, 30.0])).log) == ["1", "10"]
    assert texts(plan(points([2.0, 3.0])).log) == ["2", "2.25", "2.5", "2.75", "3"]
    assert plan(points([0.0, 1.0])).log is None
    assert plan([Point(0, 1.0, -0.5, 2.0)]).log is None


def test_what_was_not_finite_is_marked_in_gaps_and_inside_of_columns() -> None:
    shown = plan([Point(0, 1.0, 1.0, 1.0), Point(1, None, None, None), Point(2, 1.0, 1.0, 1.0, num_not_finite=3)])
    assert shown.marks == ((1, 2),)
    assert plan(points([1.0, None, None, None, 1.0, None])).marks == ((1, 3), (5, 5))
    many = plan(points([1.0, None] * 250)).marks
    assert len(many) == 24 and (many[0], many[-1]) == ((1, 1), (47, 499))
