"""Drift by the population stability index."""

from __future__ import annotations

import math
import random

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
