"""A run that lost a rank's host, in a cluster that has no slot for the rank: it waits, and says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import pytest

from jupyter_llmcloud.errors import Busy
from jupyter_llmcloud.protocol.agent_messages import (
    DescribeWorld,
    FindStandby,
    Placement,
    PlaceRanks,
    RenewLease,
    ResizeWorld,
    StandbyFound,
)
from jupyter_llmcloud.protocol.client import AgentConnection
from jupyter_llmcloud.protocol.rpc import Responder
from tests.support.worlds import AgentProcess, Ranks, Running

pytestmark = pytest.mark.slow

CELL = """import os, time
attempt = len(list(run.folder.glob(f"began-{rank}-*")))
(run.folder / f"began-{rank}-{attempt}").touch()
print("here", flush=True)
while not attempt: time.sleep(0.02)
"""


@pytest.fixture
def make_agent() -> Iterator[Callable[..., AgentProcess]]:
    """Makes agents that end with the test."""
    agents: list[AgentProcess] = []

    def make(**options: int) -> AgentProcess:
        agents.append(AgentProcess(**options))  # type: ignore[arg-type]
        return agents[-1]

    yield make
    for agent in agents:
        agent.end()


def waiting(make_agent: Callable[..., AgentProcess]) -> tuple[AgentProcess, Ranks, Running]:
    """A run of two ranks, each on an agent with one slot, whose second agent was killed."""
    leader, follower = make_agent(slots=1), make_agent(slots=1)
    ranks = Ranks(leader, 2, shares=[(leader, 1), (follower, 1)])
    running = ranks.send(CELL, max_restarts=3).wait_for("here", times=2)
    follower.process.kill()
    assert "waits for capacity" in running.wait_for_state("note").detail
    return leader, ranks, running


def test_a_stop_ends_a_run_that_waits_for_capacity_at_once(make_agent: Callable[..., AgentProcess]) -> None:
    _, _, running = waiting(make_agent)
    outcome = running.stop().end()
    assert outcome.state == "stopped"
    assert outcome.seconds < 2
    assert outcome.record.num_restarts == 0


def test_a_worker_that_joins_with_a_free_slot_ends_the_wait_and_one_restart_is_used(
    make_agent: Callable[..., AgentProcess],
) -> None:
    leader, _, running = waiting(make_agent)
    third = make_agent(slots=1)

    async def hold() -> None:
        responder = Responder("the worker")
        place = {"address": third.address, "home": third.address, "num_ranks": 1, "host": "there"}
        responder.on(PlaceRanks, lambda _: Placement(agents=[place]))
        responder.on(FindStandby, lambda _: StandbyFound(address=""))
        connection = await AgentConnection.open(leader.address, responder=responder)
        await connection.request(RenewLease(finds_capacity=True))
        await asyncio.to_thread(running.end)
        await connection.close()

    asyncio.run(hold())
    assert running.outcome.state == "finished", running.outcome
    assert running.outcome.record.num_restarts == 1
    waits = [entry["why"] for entry in running.outcome.record.history if "waits for capacity" in entry.get("why", "")]
    assert len(waits) == 1, "it is said once"


def test_a_resize_that_finds_no_slots_leaves_the_world_as_it_was(make_agent: Callable[..., AgentProcess]) -> None:
    ranks = Ranks(make_agent(slots=3), 2)
    ranks.ok("kept = rank")
    with pytest.raises(Busy):
        ranks.channel.request(ResizeWorld(world_id=ranks.world_id, num_ranks=9), 60)
    with contextlib.closing(ranks.agent.channel()) as channel:
        assert channel.request(DescribeWorld(world_id=ranks.world_id)).world_size == 2
    assert ranks.ok("kept").results() == ["0", "1"]
    ranks.channel.request(ResizeWorld(world_id=ranks.world_id, num_ranks=3), 60)
    ranks.size = 3
    assert ranks.ok("globals().get('kept', 'new')").results() == ["0", "1", "'new'"]
