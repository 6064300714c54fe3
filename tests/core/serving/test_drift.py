"""Drift by the population stability index."""

from __future__ import annotations

import math
import random

import pytest

from jupyter_llmcloud.core.serving.drift import drift_of, population_stability


def test_the_index_of_two_shares_is_that_of_its_formula() -> None:
    # Bins at the median of the earlier sample: shares 1/2, 1/2 before and 1/4, 3/4 after.
    expected = (0.5 - 0.25) * math.log(0.5 / 0.25) + (0.5 - 0.75) * math.log(0.5 / 0.75)
    earlier = [1.0] * 50 + [2.0] * 50
    assert math.isclose(population_stability(earlier, [1.0] * 25 + [2.0] * 75, num_bins=2), expected)


def test_samples_of_one_distribution_have_not_drifted_and_shifted_ones_have() -> None:
    draw = random.Random(3)
    earlier = [draw.gauss(100, 20) for _ in range(2000)]
    same = [draw.gauss(100, 20) for _ in range(1000)]
    shifted = [draw.gauss(130, 20) for _ in range(1000)]
    assert drift_of("length", earlier, same).verdict == "none"
    assert drift_of("length", earlier, shifted).verdict == "major"


def test_too_few_values_say_nothing_and_a_constant_has_not_drifted() -> None:
    assert drift_of("length", [1.0] * 49, [2.0] * 500).verdict == "unknown"
    assert drift_of("length", [1.0] * 100, [1.0] * 100).psi == 0.0


def test_a_bin_that_is_empty_now_counts_as_half_a_value() -> None:
    assert math.isfinite(population_stability([1.0] * 50 + [2.0] * 50, [3.0] * 60))


@pytest.mark.parametrize(
    ("earlier", "recent"),
    [([1.0] * 300, [-1.0] * 60), ([1.0] * 285 + [-1.0] * 15, [-1.0] * 60), ([400.0] * 300, [20.0] * 60)],
    ids=["all-up-then-down", "mostly-up-then-down", "prompts-of-one-length"],
)
def test_values_that_fall_below_one_that_nearly_all_had_have_drifted_as_those_that_rise(
    earlier: list[float], recent: list[float]
) -> None:
    """They were in one bin with it: an index of 0."""
    assert drift_of("rating", earlier, recent).verdict == "major"
    risen = drift_of("rating", [-value for value in earlier], [-value for value in recent])
    assert risen.verdict == "major"


def test_few_recent_values_like_the_many_earlier_ones_have_not_drifted_for_bins_that_neither_fills() -> None:
    assert drift_of("rating", [1.0] * 10_000, [1.0] * 50).psi == 0.0
    mixed = drift_of("rating", [1.0] * 1800 + [-1.0] * 200, [1.0] * 45 + [-1.0] * 5)
    assert mixed.verdict == "none"
