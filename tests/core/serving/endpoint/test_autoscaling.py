"""How many replicas there should be, tried on loads that are simulated with a clock of our own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from jupyter_llmcloud.core.serving.endpoint.autoscaling import (
    ArrivalRate,
    Autoscaler,
    Bounds,
    Demand,
    Smoothed,
    predicted_wait_s,
)


def test_the_predicted_wait_is_that_of_erlang_within_a_tenth() -> None:
    # One server, half in use, 1 s each: M/M/1 waits rho * S / (1 - rho) = 1 s.
    assert predicted_wait_s(Demand(0.5, 1.0, 1), 1) == pytest.approx(1.0, rel=0.1)
    # Four servers, 3.2 requests/s of 1 s (rho 0.8): Erlang C gives 0.746 s.
    assert predicted_wait_s(Demand(3.2, 1.0, 4), 1) == pytest.approx(0.746, rel=0.1)


def test_the_wait_grows_with_the_load_and_falls_with_replicas_and_is_endless_when_more_comes_than_goes() -> None:
    waits = [predicted_wait_s(Demand(rate, 1.0, 2), 1) for rate in (0.0, 0.5, 1.0, 1.5, 1.9, 2.0)]
    assert waits == sorted(waits) and waits[0] == 0 and waits[-1] == float("inf")
    assert predicted_wait_s(Demand(1.9, 1.0, 2), 2) < predicted_wait_s(Demand(1.9, 1.0, 2), 1)
    assert predicted_wait_s(Demand(0.1, 1.0, 2, num_in_flight=2, num_queued=6), 1) >= 3.0
    assert predicted_wait_s(Demand(0, 1.0, 2), 0) == 0 and predicted_wait_s(Demand(1, 1.0, 2), 0) == float("inf")


@dataclass
class Simulated:
    """An endpoint whose replicas answer `slots` requests at once, each in `service_s`, and take `start_s` to start."""

    scaler: Autoscaler
    service_s: float = 1.0
    slots: int = 2
    start_s: float = 3.0
    wanted: int = 1
    waits: list[float] = field(default_factory=list)
    history: list[int] = field(default_factory=list)

    def run(self, seconds: float, rate: Callable[[float], float], seed: int = 0) -> None:
        """Poisson arrivals at `rate(t)` per second, ten steps a second."""
        dice = random.Random(seed)
        arrivals, service = ArrivalRate(), Smoothed()
        queue: list[float] = []
        busy: list[float] = []
        ready_at = [0.0] * self.wanted
        for tick in range(int(seconds * 10)):
            now = tick / 10
            if dice.random() < rate(now) / 10:
                queue.append(now)
                arrivals.arrived(now)
            busy = [end for end in busy if end > now]
            places = sum(at <= now for at in ready_at) * self.slots
            while queue and len(busy) < places:
                self.waits.append(now - queue.pop(0))
                busy.append(now + self.service_s)
                service.add(self.service_s)
            if tick % 10 == 0:
                demand = Demand(arrivals.per_s(now), service.value or 1.0, self.slots, len(busy), len(queue))
                self.wanted = self.scaler.wanted(now, demand, self.wanted)
                del ready_at[self.wanted :]
                ready_at += [now + self.start_s] * (self.wanted - len(ready_at))
                self.history.append(self.wanted)


def test_a_load_that_one_replica_carries_is_left_with_one() -> None:
    endpoint = Simulated(Autoscaler(Bounds(1, 4)))
    endpoint.run(600, lambda t: 0.3)
    assert max(endpoint.history) <= 2 and endpoint.history.count(1) > 0.75 * len(endpoint.history)


def test_more_replicas_come_with_the_load_and_go_when_it_has_gone_one_by_one() -> None:
    endpoint = Simulated(Autoscaler(Bounds(1, 4)))
    endpoint.run(900, lambda t: 5.0 if 100 <= t < 300 else 0.1)
    assert max(endpoint.history[100:130]) >= 3  # half a minute later
    assert endpoint.history[-1] == 1
    drops = [a - b for a, b in itertools.pairwise(endpoint.history) if a > b]
    assert drops and set(drops) == {1}


def test_a_steady_load_makes_no_replicas_come_and_go() -> None:
    endpoint = Simulated(Autoscaler(Bounds(1, 4)))
    endpoint.run(1200, lambda t: 2.5, seed=3)
    settled = endpoint.history[200:]
    changes = sum(a != b for a, b in itertools.pairwise(settled))
    assert changes <= 4, settled
    assert sorted(endpoint.waits)[int(0.95 * len(endpoint.waits))] < 3.0


def test_the_bounds_hold_whatever_comes() -> None:
    endpoint = Simulated(Autoscaler(Bounds(2, 3)), wanted=1)
    endpoint.run(200, lambda t: 9.0)
    assert set(endpoint.history) <= {2, 3}


def test_the_last_replica_goes_when_nobody_asks_for_long_and_one_comes_with_the_next_request() -> None:
    scaler = Autoscaler(Bounds(0, 2), idle_after_s=300)
    idle = Demand(0.0, 1.0, 4)
    assert scaler.wanted(0, idle, 1) == 1 and scaler.wanted(299, idle, 1) == 1
    assert scaler.wanted(300, idle, 1) == 0
    assert scaler.wanted(301, idle, 0) == 0
    assert scaler.wanted(302, Demand(0.05, 1.0, 4, num_queued=1), 0) == 1


def test_a_request_in_between_starts_the_wait_again() -> None:
    scaler = Autoscaler(Bounds(0, 2), idle_after_s=300)
    idle = Demand(0.0, 1.0, 4)
    scaler.wanted(0, idle, 1)
    scaler.wanted(200, Demand(0.05, 1.0, 4, num_in_flight=1), 1)
    assert scaler.wanted(300, idle, 1) == 1 and scaler.wanted(599, idle, 1) == 1
    assert scaler.wanted(600, idle, 1) == 0


def test_a_rate_fades_and_becomes_none() -> None:
    rate = ArrivalRate(over_s=20)
    for second in range(200):
        rate.arrived(float(second))
    assert rate.per_s(200.0) == pytest.approx(1.0, rel=0.1)
    assert rate.per_s(400.0) == 0
