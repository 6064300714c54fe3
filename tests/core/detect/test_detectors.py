"""What detectors find, and what they leave alone."""

from __future__ import annotations

import math
import random

import pytest

from jupyter_llmcloud.core.detect.growth import GrowthDetector, Level, slope
from jupyter_llmcloud.core.detect.run_detectors import RunDetectors, policies
from jupyter_llmcloud.core.detect.waits import DataBoundDetector, Shares, StragglerDetector
from jupyter_llmcloud.errors import UsageError

GIB = 2**30
NOTHING = {"compute": 0.0, "communication": 0.0, "data": 0.0, "waiting": 0.0, "checkpoint": 0.0}


def losses(values: list[float], name: str = "loss", chosen: str = "") -> list[float | None]:
    """The steps that are told."""
    watch = RunDetectors(chosen)
    records = [{"step": step, "values": {name: value}} for step, value in enumerate(values)]
    return [alert.step for alert in watch.metrics(0, records)]


def falling(num: int) -> list[float]:
    noise = random.Random(5)
    return [math.exp(1 - step / num + noise.gauss(0, 0.1)) for step in range(num)]


@pytest.mark.parametrize("name", ["loss", "train/loss", "grad_norm"])
def test_a_value_that_jumps_is_told_with_its_step(name: str) -> None:
    values = falling(300)
    values[200] *= 5
    assert losses(values, name) == [200]


def test_falling_noisy_and_not_finite_losses_are_no_spikes() -> None:
    values = falling(1000)
    values[500:502] = [math.nan, math.inf]
    assert losses(values) == []


def test_a_level_that_stays_is_told_once() -> None:
    assert losses([*falling(200), *[9 * value for value in falling(200)]]) == [200]


def test_an_evaluation_and_the_time_before_the_warm_up_are_let_alone() -> None:
    assert losses([*falling(30), 100.0, *falling(30)]) == []
    assert losses([*falling(200), 100.0], "eval_loss") == []
    assert losses([*falling(200), 100.0], chosen="loss-spike=off") == []


def test_the_rank_that_waits_for_nobody_is_the_slow_one_and_is_told_once() -> None:
    detector, found = StragglerDetector(), []
    for reading in range(40):
        waiting = {**NOTHING, "compute": 0.5, "waiting": 0.5}
        detector.feed(Shares(2.0 * reading, {0: waiting, 1: {**NOTHING, "compute": 1.0}, 2: waiting}))
        found.append(detector.check())
    told = [alert for alert in found if alert is not None]
    assert [alert.ranks for alert in told] == [(1,)] and told[0].statistic == 0.5
    assert found.index(told[0]) == 10


def test_a_rank_that_writes_the_checkpoint_is_no_straggler() -> None:
    detector = StragglerDetector()
    for reading in range(40):
        ranks = {0: {**NOTHING, "checkpoint": 0.6, "compute": 0.4}, 1: {**NOTHING, "waiting": 0.6, "compute": 0.4}}
        detector.feed(Shares(2.0 * reading, ranks))
        assert detector.check() is None


def test_ranks_that_wait_for_data_are_told_and_a_short_time_of_it_is_not() -> None:
    detector, found = DataBoundDetector(), 0
    for reading in range(40):
        is_slow = reading < 5 or reading >= 20
        detector.feed(Shares(2.0 * reading, {0: {**NOTHING, "data": 0.6 if is_slow else 0.0}}))
        found += (alert := detector.check()) is not None
        assert alert is None or reading >= 30
    assert found == 1


def test_a_leak_is_told_with_the_time_that_is_left() -> None:
    detector, told = GrowthDetector("memory-leak", "the memory of rank 1", "limit"), []
    for reading in range(200):
        detector.feed(Level(2.0 * reading, 2 * GIB + reading * 20 * 2**20, 16 * GIB))
        told += [alert] if (alert := detector.check()) else []
    assert len(told) == 1 and "grows by 600.0 MiB a minute" in told[0].text


def test_a_cache_that_fills_up_and_one_that_is_emptied_are_no_leaks() -> None:
    for used in (lambda t: 3 * GIB * (1 - math.exp(-t / 100)), lambda t: t % 90 / 90 * GIB):
        detector = GrowthDetector("memory-leak", "memory", "limit")
        for reading in range(400):
            detector.feed(Level(2.0 * reading, GIB + used(2.0 * reading), 16 * GIB))
            assert detector.check() is None


def test_the_slope_is_not_moved_by_a_wild_point() -> None:
    points = [(float(x), 3.0 * x) for x in range(40)]
    points[20] = (20.0, 1e6)
    assert slope(points)[0] == pytest.approx(3)


@pytest.mark.parametrize(
    "text", ["spikes=stop", "loss-spike", "loss-spike=perhaps", "", "straggler=off,straggler=stop"]
)
def test_a_policy_that_cannot_be_is_refused_with_what_can(text: str) -> None:
    with pytest.raises(UsageError, match=r"Allowed|expected|twice"):
        policies(text)


def test_a_leak_after_a_long_quiet_time_is_told_before_as_much_time_has_passed_again() -> None:
    detector, quiet_s = GrowthDetector("memory-leak", "memory", "memory of its host"), 3600
    told = None
    for now in range(0, 2 * quiet_s, 10):
        leaked = max(0, now - quiet_s) * 2**20 * 5  # 5 MiB a second, of 16 GiB
        detector.feed(Level(float(now), 2**32 + leaked, 2**34))
        if (alert := detector.check()) is not None and told is None:
            told, text = now - quiet_s, alert.text
    assert told is not None and 300 <= told <= 1500 and "memory grows by 300.0 MiB a minute" in text


def test_a_metric_is_looked_at_when_the_rank_that_logged_it_first_has_gone() -> None:
    """As where an elastic run has fewer ranks, or a worker of async-ps has died."""
    for leave in (RunDetectors.begin_attempt, lambda watch: watch.let_go(3)):
        watch, values = RunDetectors(), falling(300)
        values[250] *= 9
        records = [{"step": step, "values": {"loss": value}} for step, value in enumerate(values)]
        assert watch.metrics(3, records[:150]) == watch.metrics(0, records[:150]) == []
        leave(watch)
        assert [alert.step for alert in watch.metrics(0, records[150:])] == [250]
        assert watch.metrics(1, records[150:]) == []
