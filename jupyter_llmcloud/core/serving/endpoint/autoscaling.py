"""How many replicas an endpoint needs: from what comes, how long it takes, and how long it would wait.

The wait in a queue with c servers is predicted after Sakasegawa (1977), an approximation of M/M/c:
`S / c * rho ** (sqrt(2 * (c + 1)) - 1) / (1 - rho)`, with S seconds of service and rho the share of servers in use;
what waits already comes on top of it. More replicas come at once, fewer only after a while in which fewer would have
done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

INFINITE = float("inf")


@dataclass(frozen=True)
class Bounds:
    """Between how many replicas."""

    low: int
    high: int


@dataclass(frozen=True)
class Demand:
    """What an endpoint has to do.

    Attributes:
        arrivals_per_s: requests that came of late.
        service_s: seconds that a replica takes for one, on average.
        slots: requests that a replica answers at once.
        num_in_flight: requests that are answered now.
        num_queued: requests that wait now.
    """

    arrivals_per_s: float
    service_s: float
    slots: int
    num_in_flight: int = 0
    num_queued: int = 0

    @property
    def is_idle(self) -> bool:
        """Nobody asks."""
        return not (self.arrivals_per_s or self.num_in_flight or self.num_queued)


def predicted_wait_s(demand: Demand, num_replicas: int) -> float:
    """Seconds that a request would wait for its turn with so many replicas."""
    servers = num_replicas * demand.slots
    if servers <= 0:
        return 0.0 if demand.is_idle else INFINITE
    use = demand.arrivals_per_s * demand.service_s / servers
    backlog = max(0, demand.num_queued + demand.num_in_flight - servers) * demand.service_s / servers
    if use >= 1:
        return INFINITE
    queue = demand.service_s / servers * use ** (math.sqrt(2 * (servers + 1)) - 1) / (1 - use) if use > 0 else 0.0
    return queue + backlog


@dataclass
class Autoscaler:
    """The wanted number of replicas of one endpoint.

    Attributes:
        target_wait_s: what a request may wait.
        shrink_after_s: how long fewer must have done.
        idle_after_s: how long nobody must have asked before the last replica goes, where none is allowed.
        cooldown_s: between two steps up, since a replica that starts takes no load off yet.
    """

    bounds: Bounds
    target_wait_s: float = 0.5
    shrink_after_s: float = 60.0
    idle_after_s: float = 300.0
    cooldown_s: float = 5.0
    _fewer_since: float | None = None
    _idle_since: float | None = None
    _grown_at: float = -INFINITE

    def wanted(self, now: float, demand: Demand, num_replicas: int) -> int:
        """How many replicas there should be, of `num_replicas` that are wanted by now."""
        low, high = self.bounds.low, self.bounds.high
        self._idle_since = None if not demand.is_idle else now if self._idle_since is None else self._idle_since
        if demand.num_queued and num_replicas == 0:
            return self._grow(now, max(1, low))
        if num_replicas < low or num_replicas > high:
            return min(high, max(low, num_replicas))
        least = max(1, low)
        needed = next((n for n in range(least, high) if self._suffices(demand, n)), high)
        if needed > num_replicas:
            self._fewer_since = None
            if demand.is_idle or now < self._grown_at + self.cooldown_s:
                return num_replicas
            return self._grow(now, needed)
        if low == 0 and num_replicas and self._idle_since is not None and now >= self._idle_since + self.idle_after_s:
            return 0
        if num_replicas <= least or not self._suffices(demand, num_replicas - 1, 0.5):
            self._fewer_since = None
            return num_replicas
        self._fewer_since = now if self._fewer_since is None else self._fewer_since
        if now < self._fewer_since + self.shrink_after_s:
            return num_replicas
        self._fewer_since = now
        return num_replicas - 1

    def _grow(self, now: float, number: int) -> int:
        self._grown_at, self._fewer_since = now, None
        return min(self.bounds.high, number)

    def _suffices(self, demand: Demand, num_replicas: int, share: float = 1.0) -> bool:
        return predicted_wait_s(demand, num_replicas) <= share * self.target_wait_s


@dataclass
class ArrivalRate:
    """Requests per second, smoothed over about `over_s` seconds."""

    over_s: float = 30.0
    _rate: float = 0.0
    _at: float | None = None

    def arrived(self, now: float) -> None:
        """A request came."""
        self._decay(now)
        self._rate += 1 / self.over_s

    def per_s(self, now: float) -> float:
        """As it is now; a rate that has become very small is none."""
        self._decay(now)
        return self._rate if self._rate * self.over_s > 0.02 else 0.0

    def _decay(self, now: float) -> None:
        if self._at is not None:
            self._rate *= math.exp(-(now - self._at) / self.over_s)
        self._at = now


@dataclass
class Smoothed:
    """A mean that follows what was measured last."""

    weight: float = 0.1
    value: float | None = None

    def add(self, measured: float) -> None:
        """One more."""
        self.value = measured if self.value is None else self.value + self.weight * (measured - self.value)
