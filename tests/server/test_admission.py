"""Who is let through to a replica, by values."""

from __future__ import annotations

import asyncio
import time

import pytest

from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape
from jupyter_llmcloud.server.endpoints.replica_client import ReplicaClient
from jupyter_llmcloud.server.gateway.admission import AdmissionControl, NotAdmitted
from jupyter_llmcloud.storage.server_state import StoredReplica


def replica(number: int = 1, places: int = 1, revision: int = 1, weight: int = 100) -> ReplicaClient:
    made = ReplicaClient(number, StoredReplica(id=f"r{number}"))
    made.load.capacity, made.load.revision, made.weight = places, revision, weight
    return made


async def test_who_hangs_up_when_a_place_becomes_free_gives_it_to_the_next() -> None:
    """At that very moment: the place is granted, and the request is cut before it knows."""
    one = replica()
    admission = AdmissionControl(lambda: [one], lambda: False)
    await admission.enter()
    waiting = asyncio.ensure_future(admission.enter())
    await asyncio.sleep(0)
    following = asyncio.ensure_future(admission.enter())
    await asyncio.sleep(0)
    admission.leave(one)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await asyncio.wait_for(following, 1) is one
    admission.leave(one)
    assert (one.num_in_flight, admission.num_waiting) == (0, 0)


async def test_a_request_waits_for_its_own_revision_while_that_of_others_has_places() -> None:
    full, free = replica(1, places=1, revision=1, weight=50), replica(2, places=8, revision=2, weight=50)
    admission = AdmissionControl(lambda: [full, free], lambda: False)
    keys = [f"key:{number}" for number in range(40)]
    first = [await admission.enter(shape=RequestShape(key=key)) for key in keys[:1]]
    stays = {key: (await _entered(admission, key)) for key in keys[1:9]}
    assert {one.load.revision for one in [*first, *(s for s in stays.values() if s)]} <= {1, 2}
    assert full.num_in_flight <= 1
    assert admission.num_waiting == 0  # those whose patience is over wait no longer


async def _entered(admission: AdmissionControl, key: str) -> ReplicaClient | None:
    try:
        return await admission.enter(patience_s=0.01, shape=RequestShape(key=key))
    except NotAdmitted:
        return None


async def test_who_can_wait_long_enough_waits_for_a_replica_that_is_started_and_who_cannot_is_told_when() -> None:
    there: list[ReplicaClient] = []
    woken: list[float] = []

    def wake() -> float:
        woken.append(12.3)
        return 12.3

    admission = AdmissionControl(lambda: there, lambda: True, wake)
    with pytest.raises(NotAdmitted) as refused:
        await admission.enter(patience_s=5)
    assert (refused.value.status, refused.value.retry_after_s) == (503, 13) and woken
    waiting = asyncio.ensure_future(admission.enter(patience_s=30))
    await asyncio.sleep(0)
    there.append(replica())
    admission.admit()
    assert await asyncio.wait_for(waiting, 1) is there[0]


async def test_what_goes_on_from_an_answer_goes_to_the_replica_that_keeps_it_or_waits_for_it() -> None:
    keeper, idle = replica(1, places=1), replica(2, places=8)
    replicas = [keeper, idle]
    admission = AdmissionControl(lambda: replicas, lambda: False)
    shape = RequestShape(replica="r1")
    assert await admission.enter(shape=shape) is keeper
    waiting = asyncio.ensure_future(admission.enter(shape=shape))
    await asyncio.sleep(0)
    assert not waiting.done() and idle.load.is_free
    admission.leave(keeper, shape)
    assert await asyncio.wait_for(waiting, 1) is keeper
    replicas.remove(keeper)
    assert await admission.enter(shape=shape) is idle  # which says that the answer is gone


async def test_whose_patience_ends_when_a_place_becomes_free_gives_it_to_the_next() -> None:
    """In the same round of the loop: the place is granted, and the time is over before it knows."""
    one = replica()
    admission = AdmissionControl(lambda: [one], lambda: False)
    await admission.enter()
    waiting = asyncio.ensure_future(admission.enter(patience_s=0.01))
    await asyncio.sleep(0)
    following = asyncio.ensure_future(admission.enter())
    await asyncio.sleep(0)
    time.sleep(0.02)  # the loop is busy: when it looks at the clock again, the time is over
    asyncio.get_running_loop().call_soon(admission.leave, one)
    with pytest.raises(NotAdmitted):
        await waiting
    assert await asyncio.wait_for(following, 1) is one
    admission.leave(one)
    assert (one.num_in_flight, admission.num_waiting) == (0, 0)
