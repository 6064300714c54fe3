"""How long a bar still takes, with its interval."""

from __future__ import annotations

import random

import pytest

from jupyter_llmcloud.core.metrics.eta import MAX_BINS, MIN_BINS, StepDurations, TimeLeft
from jupyter_llmcloud.core.metrics.progress import Bar


def left(steps: list[float], units: float) -> TimeLeft:
    times = StepDurations()
    for seconds in steps:
        times.add(1, seconds)
    found = times.left(units)
    assert found is not None
    return found


def test_even_steps_leave_little_doubt_the_less_the_more_of_them_was_seen() -> None:
    late, early = left([2.0] * 100, 50), left([2.0] * 10, 140)
    assert (late.low, late.middle, late.high) == pytest.approx((100, 100, 100), rel=0.02)
    assert late.low < 100 < late.high
    assert early.middle == pytest.approx(280) and early.high - early.middle > 0.04 * 280


def test_slow_changes_of_the_pace_make_a_wider_interval_than_changes_from_step_to_step() -> None:
    random_ = random.Random(5)
    noise = [random_.choice((0.8, 1.2)) for _ in range(400)]
    slow = [level for level in noise[:20] for _ in range(20)]
    quick_left, slow_left = left(noise, 400), left(slow, 400)
    assert slow_left.high - slow_left.low > 1.5 * (quick_left.high - quick_left.low)


def test_before_enough_steps_there_is_no_interval() -> None:
    times = StepDurations()
    for _ in range(MIN_BINS - 1):
        times.add(1, 1.0)
    assert times.left(10) is None
    times.add(1, 1.0)
    assert times.left(10) is not None
    assert times.left(0) is None


def test_evaluations_between_the_steps_are_expected_to_come_again() -> None:
    found = left([60.0 if step % 50 == 49 else 1.0 for step in range(500)], 500)
    assert found.middle == pytest.approx(500 * 109 / 50, rel=0.05)
    assert found.low < 500 * 109 / 50 < found.high


def test_noisier_steps_make_a_wider_interval() -> None:
    random_ = random.Random(3)
    calm, noisy = ([random_.lognormvariate(0, sigma) for _ in range(400)] for sigma in (0.1, 1.0))
    calm_left, noisy_left = left(calm, 400), left(noisy, 400)
    assert noisy_left.high - noisy_left.low > 3 * (calm_left.high - calm_left.low)


def test_a_pace_that_changed_for_good_makes_the_past_before_it_tell_nothing() -> None:
    found = left([1.0] * 200 + [3.0] * 200, 100)
    assert found.middle == pytest.approx(300, rel=0.02)


def test_a_slope_reaches_into_the_interval() -> None:
    random_ = random.Random(1)
    steps = [1 + step / 1000 + random_.gauss(0, 0.05) for step in range(2000)]
    found, truth = left(steps[:1000], 1000), sum(steps[1000:])
    assert found.low < truth < found.high


def test_a_bar_that_jumps_takes_bounded_memory() -> None:
    times = StepDurations()
    times.add(1e-3, 1e-3)
    times.add(1e6, 1e6)
    found = times.left(1e6)
    assert found is not None
    assert found.middle == pytest.approx(1e6, rel=0.01)
    assert len(times._bins) < MAX_BINS


def test_a_bar_tells_the_interval_and_begins_anew_with_a_new_pass() -> None:
    bar = Bar(100)
    for step in range(51):
        bar.move(0, step, "", now=2.0 * step)
    span = bar.time_left(now=101.0)
    assert span is not None
    assert (span.low, span.middle, span.high) == pytest.approx((99, 99, 99), rel=0.04)
    assert bar.eta(101.0) == pytest.approx(99)
    bar.move(0, 0, "", now=102.0)
    assert bar.time_left(102.0) is None
