"""Who is let through to a replica, and who waits: a bounded queue per endpoint, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jupyter_llmcloud.server.endpoints.replica_client import ReplicaClient

MAX_QUEUED_PER_REPLICA = 64
QUEUE_TIMEOUT_S = 30.0


class NotAdmitted(Exception):
    """Nobody can answer now: `status` is 429 (too many are waiting) or 503 (no replica is ready)."""

    def __init__(self, status: int, reason: str, retry_after_s: int | None) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after_s = retry_after_s


class AdmissionControl:
    """Lets requests to one endpoint through to its replicas, or has them wait.

    Args:
        ready: which replicas can be asked.
        may_recover: whether waiting is worth it when none can: another one is on its way.
    """

    def __init__(self, ready: Callable[[], Iterable[ReplicaClient]], may_recover: Callable[[], bool]) -> None:
        self._ready = ready
        self._may_recover = may_recover
        self._waiting: deque[asyncio.Future[ReplicaClient]] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a replica."""
        return sum(not place.done() for place in self._waiting)

    async def enter(self, avoid: frozenset[str] = frozenset(), patience_s: float = QUEUE_TIMEOUT_S) -> ReplicaClient:
        """The replica with the fewest requests, but for those in `avoid`; its place is taken until `leave`."""
        candidates = [replica for replica in self._ready() if replica.id not in avoid]
        if not candidates and not self._may_recover():
            raise NotAdmitted(503, "no replica is ready at the moment.", 2)
        free = [replica for replica in candidates if replica.num_in_flight < replica.max_concurrent]
        if free and (not self._waiting or avoid):
            return min(free, key=lambda replica: replica.num_in_flight).enter()
        if len(self._waiting) >= MAX_QUEUED_PER_REPLICA * max(1, len(candidates)):
            raise NotAdmitted(429, f"{len(self._waiting)} requests are waiting already.", 1)
        return await self._wait(patience_s)

    async def _wait(self, patience_s: float) -> ReplicaClient:
        place: asyncio.Future[ReplicaClient] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            # Not wait_for, which on Python 3.11 forgets a cancellation that comes with the result.
            async with asyncio.timeout(patience_s):
                return await place
        except TimeoutError:
            raise NotAdmitted(503, f"no place became free within {patience_s:.0f} s.", 5) from None
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.leave(place.result())
            raise
        finally:
            if place in self._waiting:
                self._waiting.remove(place)

    def leave(self, replica: ReplicaClient) -> None:
        """A request is over."""
        replica.leave()
        self.admit()

    def admit(self) -> None:
        """Let those in who now can be: a place became free, a replica became ready, or no other will come."""
        while self._waiting:
            ready = list(self._ready())
            free = [replica for replica in ready if replica.num_in_flight < replica.max_concurrent]
            if not free and (ready or self._may_recover()):
                return
            place = self._waiting.popleft()
            if place.done():
                continue
            if free:
                place.set_result(min(free, key=lambda replica: replica.num_in_flight).enter())
            else:
                place.set_exception(NotAdmitted(503, "its last replica was lost while the request waited.", None))
