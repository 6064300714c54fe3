"""Who is let through to a replica, by values."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.server.gateway.admission import AdmissionControl


def replica_with_one_place() -> Any:
    replica = SimpleNamespace(id="r", num_in_flight=0, max_concurrent=1)

    def enter() -> Any:
        replica.num_in_flight += 1
        return replica

    def leave() -> None:
        replica.num_in_flight -= 1

    replica.enter, replica.leave = enter, leave
    return replica


async def test_who_hangs_up_when_a_place_becomes_free_gives_it_to_the_next() -> None:
    """At that very moment: the place is granted, and the request is cut before it knows."""
    replica = replica_with_one_place()
    admission = AdmissionControl(lambda: [replica], lambda: False)
    await admission.enter()
    waiting = asyncio.ensure_future(admission.enter())
    await asyncio.sleep(0)
    following = asyncio.ensure_future(admission.enter())
    await asyncio.sleep(0)
    admission.leave(replica)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await asyncio.wait_for(following, 1) is replica
    admission.leave(replica)
    assert (replica.num_in_flight, admission.num_waiting) == (0, 0)
