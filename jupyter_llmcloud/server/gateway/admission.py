"""Who is let through to a replica, and who waits: a bounded queue per endpoint, first come, first served."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape, closed, pick_replica, pick_revision

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
        wake: called when none is there; starts one where none was needed, and tells in how many seconds it is likely
            to be ready (None: not known).
    """

    def __init__(
        self,
        ready: Callable[[], Iterable[ReplicaClient]],
        may_recover: Callable[[], bool],
        wake: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._ready = ready
        self._may_recover = may_recover
        self._wake = wake
        self._waiting: deque[_WaitingRequest] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a replica."""
        return sum(not place.granted.done() for place in self._waiting)

    def enter_now(self, shape: RequestShape) -> ReplicaClient | None:
        """As `enter`, where nobody has to wait; None: that must be asked."""
        found = None if self._waiting else choose(shape, list(self._ready()))
        return None if found is None else found.enter(shape)

    async def enter(
        self,
        avoid: frozenset[str] = frozenset(),
        patience_s: float = QUEUE_TIMEOUT_S,
        shape: RequestShape = RequestShape(),  # noqa: B008 - a value
    ) -> ReplicaClient:
        """The replica that suits a request best, but for those in `avoid`; its place is taken until `leave`."""
        candidates = [replica for replica in self._ready() if replica.id not in avoid]
        if not candidates and not self._may_recover():
            raise NotAdmitted(503, "no replica is ready at the moment.", 2)
        if not candidates and (due_s := self._wake()) is not None and due_s > patience_s:
            raise NotAdmitted(503, f"a replica is being started, which takes about {due_s:.0f} s.", math.ceil(due_s))
        if (not self._waiting or avoid) and (found := choose(shape, candidates)) is not None:
            return found.enter(shape)
        if len(self._waiting) >= MAX_QUEUED_PER_REPLICA * max(1, len(candidates)):
            raise NotAdmitted(429, f"{len(self._waiting)} requests are waiting already.", 1)
        return await self._wait(_WaitingRequest(shape, asyncio.get_running_loop().create_future()), patience_s)

    async def _wait(self, place: _WaitingRequest, patience_s: float) -> ReplicaClient:
        self._waiting.append(place)
        self.admit()
        try:
            # Not wait_for, which on Python 3.11 forgets a cancellation that comes with the result.
            async with asyncio.timeout(patience_s):
                return await place.granted
        except TimeoutError:
            self._give_back(place)
            lacking = "no place became free" if any(self._ready()) else "no replica became ready"
            raise NotAdmitted(503, f"{lacking} within {patience_s:.0f} s.", 5) from None
        except asyncio.CancelledError:
            self._give_back(place)
            raise
        finally:
            if place in self._waiting:
                self._waiting.remove(place)

    def _give_back(self, place: _WaitingRequest) -> None:
        """A request waits no longer: its place may have been granted in the very moment in which it gave up."""
        granted = place.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            self.leave(granted.result(), place.shape)

    def leave(self, replica: ReplicaClient, shape: RequestShape = RequestShape()) -> None:  # noqa: B008
        """A request is over."""
        replica.leave(shape)
        self.admit()

    def admit(self) -> None:
        """Let those in who now can be: a place became free, a replica became ready, or no other will come."""
        ready = list(self._ready())
        if not ready and self._may_recover():
            return
        for place in list(self._waiting):
            if place.granted.done():
                self._waiting.remove(place)
            elif not ready:
                self._waiting.remove(place)
                lost = NotAdmitted(503, "it has no replica, and none is on its way.", None)
                place.granted.set_exception(lost)
            elif (found := choose(place.shape, ready)) is not None:
                self._waiting.remove(place)
                place.granted.set_result(found.enter(place.shape))
            elif not any(replica.load.is_free for replica in ready):
                return


@dataclass(frozen=True, eq=False)
class _WaitingRequest:
    """A request that waits."""

    shape: RequestShape
    granted: asyncio.Future[ReplicaClient]


def choose(shape: RequestShape, replicas: Sequence[ReplicaClient]) -> ReplicaClient | None:
    """Which of them answers; None when those of its revision, or the one that it goes on from, have no place now.

    When the one that it goes on from is there no longer, any other one refuses the request and says so.
    """
    if shape.replica and (keeper := next((one for one in replicas if one.id == shape.replica), None)) is not None:
        return keeper if keeper.load.is_free else None
    if len(replicas) == 1:  # a breaker keeps requests away from it only if there is another one
        return replicas[0] if replicas[0].load.is_free else None
    by_number = {replica.number: replica for replica in replicas}
    allowed = closed({number: replica.breaker for number, replica in by_number.items()}, time.monotonic())
    weights = {by_number[number].load.revision: by_number[number].weight for number in allowed}
    if not weights:
        return None
    revision = pick_revision(weights, shape.key) if any(weights.values()) else max(weights)
    loads = {number: by_number[number].load for number in allowed if by_number[number].load.revision == revision}
    number = pick_replica(shape, loads)
    return None if number is None else by_number[number]
