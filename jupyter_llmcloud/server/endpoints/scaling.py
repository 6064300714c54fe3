"""The load on one endpoint, and how many replicas it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jupyter_llmcloud.core.serving.endpoint.autoscaling import ArrivalRate, Autoscaler, Bounds, Demand, Smoothed

if TYPE_CHECKING:
    from jupyter_llmcloud.core.serving.endpoint.revision import Revision
    from jupyter_llmcloud.server.endpoints.replica_client import ReplicaClient

EVERY_S = 1.0
UNKNOWN_SERVICE_S = 1.0


class Scaling:
    """Counts what comes and how long it takes; `now` is of one clock throughout, in seconds."""

    def __init__(self) -> None:
        self._arrivals = ArrivalRate()
        self._service = Smoothed()
        self._autoscaler: Autoscaler | None = None
        self._most: tuple[int, float] = (0, float("-inf"))  # replicas, until when

    def arrived(self, now: float) -> None:
        """A request came."""
        self._arrivals.arrived(now)

    def answered(self, seconds: float) -> None:
        """A replica took so long for one."""
        self._service.add(seconds)

    def hold(self, num_replicas: int, until: float) -> None:
        """Others of higher priority wait for slots: no more replicas than these for a while."""
        self._most = (num_replicas, until)

    def most(self, now: float) -> int | None:
        """How many replicas there may be at most; None: as many as its bounds say."""
        return self._most[0] if now < self._most[1] else None

    def wanted(self, now: float, revision: Revision, replicas: Sequence[ReplicaClient], num_queued: int) -> int:
        """How many replicas of a revision there should be."""
        low, high = revision.min_replicas, revision.max_replicas
        if low is None or high is None:
            return revision.num_replicas
        bounds = Bounds(low, high)
        if self._autoscaler is None:
            self._autoscaler = Autoscaler(bounds)
        self._autoscaler.bounds = bounds
        slots = [int(r.reported.get("num_parallel") or r.load.capacity) for r in replicas if r.reported]
        demand = Demand(
            arrivals_per_s=self._arrivals.per_s(now),
            service_s=self._service.value or UNKNOWN_SERVICE_S,
            slots=min(slots, default=revision.max_concurrent),
            num_in_flight=sum(replica.num_in_flight for replica in replicas),
            num_queued=num_queued,
        )
        wanted, most = self._autoscaler.wanted(now, demand, revision.num_replicas), self.most(now)
        return wanted if most is None else min(wanted, most)
