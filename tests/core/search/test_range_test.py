"""What a range test suggests, from losses and speeds as they come."""

from __future__ import annotations

import math
import random

import pytest

from jupyter_llmcloud.core.search.range_test import (
    BatchMeasured,
    has_diverged,
    smoothed,
    suggest_rate,
    suggest_size,
    why_stop,
)

RATES = [1e-6 * 1.2**step for step in range(90)]


def quadratic(rates: list[float], curvature: float = 50.0) -> list[float]:
    """Losses of gradient descent on a parabola, at growing rates: it diverges above 2 / curvature."""
    x, losses = 3.0, []
    for rate in rates:
        losses.append(0.5 * curvature * x * x + 1)
        x = max(-1e6, min(1e6, x - rate * curvature * x))
    return losses


def test_the_rate_lies_below_where_the_loss_would_diverge() -> None:
    found = suggest_rate(RATES, quadratic(RATES))
    assert found.rate is not None and found.lowest is not None
    assert 1e-4 < found.rate < 2 / 50 and found.rate <= found.lowest
    assert "fell steepest at" in found.reason


@pytest.mark.parametrize("seed", range(20))
def test_batches_that_differ_do_not_make_the_lowest_rates_look_steep(seed: int) -> None:
    """A rate at which nothing is learned, suggested for the chance of two batches, would look like a result."""
    random_ = random.Random(seed)
    rates = [1e-7 * 1.2**step for step in range(100)]
    losses = [7.4 / (1 + (rate / 0.02) ** 1.5) * random_.lognormvariate(0, 0.35) for rate in rates]
    found = suggest_rate(rates, losses)
    assert found.rate is not None and found.lowest is not None
    assert 1e-3 < found.rate < 0.5 and found.rate <= found.lowest


def test_a_loss_that_never_falls_suggests_nothing_and_says_so() -> None:
    found = suggest_rate(RATES, [2.0 + 0.01 * step for step in range(len(RATES))])
    assert found.rate is None and "at no rate the loss fell: it began at 2" in found.reason


def test_losses_that_are_no_numbers_are_named() -> None:
    found = suggest_rate(RATES, [math.nan] * len(RATES))
    assert found.rate is None and "only 0 losses were finite" in found.reason


def test_a_loss_that_still_falls_in_the_end_asks_for_more() -> None:
    losses = [10 - 0.1 * step for step in range(len(RATES))]
    assert "try a higher --high" in suggest_rate(RATES, losses).reason


def test_a_test_ends_when_the_loss_has_left_its_range() -> None:
    losses = quadratic(RATES)
    ended = next(count for count in range(1, len(losses)) if has_diverged(losses[:count]))
    assert 30 < ended < len(losses) and has_diverged([1.0, math.inf]) and not has_diverged([1.0] * 50)
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


def test_batches_grow_until_more_is_not_faster() -> None:
    rows = [BatchMeasured(1, 100, 0), BatchMeasured(2, 190, 0), BatchMeasured(4, 200, 0)]
    assert why_stop(rows[:1], 1 << 30, 999) == "" and why_stop(rows[:2], 1 << 30, 999) == ""
    assert why_stop(rows, 1 << 30, 999) == "4 rows went 1.05 times as fast as 2: more is not faster"
    assert suggest_size(rows) == 2


def test_batches_end_before_memory_does() -> None:
    rows = [BatchMeasured(8, 100, 1 << 30), BatchMeasured(16, 190, 3 << 30)]
    assert "would need about 4,096 MiB more than is free" in why_stop(rows, 4 << 30, 999)
    assert why_stop(rows, 64 << 30, 999) == ""
    lost = [*rows, BatchMeasured(32, 0, 0, fits=False)]
    assert why_stop(lost, 64 << 30, 999) == "a batch of 32 did not fit into memory" and suggest_size(lost) == 16
    assert suggest_size(lost[-1:]) is None and why_stop(rows, 64 << 30, 20) == "there are no more than 20 rows"


@pytest.mark.parametrize(("start", "slope", "noise"), [(0.0, 0.0, 0.1), (0.05, -0.001, 0.05), (-2.0, 0.0, 0.1)])
def test_losses_around_zero_or_below_have_not_diverged(start: float, slope: float, noise: float) -> None:
    """As those of a critic or a policy: four times the lowest of them is no measure."""
    dice, losses = random.Random(1), []
    for step in range(100):
        losses.append(start + slope * step + dice.gauss(0, noise))
        assert not has_diverged(losses), step
    assert has_diverged([*losses, *(100.0 for _ in range(5))])
