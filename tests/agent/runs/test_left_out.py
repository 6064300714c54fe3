"""A run whose slow host is left out: it goes on without it, from the step at which it was, and does not take it back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest

from jupyter_llmcloud.core.scheduling.placement import agent_key
from jupyter_llmcloud.errors import CapacityError
from jupyter_llmcloud.protocol.agent_messages import FindStandby, Placement, PlaceRanks, RenewLease, StandbyFound
from jupyter_llmcloud.protocol.client import AgentConnection
from jupyter_llmcloud.protocol.rpc import Responder
from jupyter_llmcloud.storage.journal import read_all
from jupyter_llmcloud.storage.runs import RunFolder
from tests.support.worlds import AgentProcess, Ranks, until

pytestmark = [pytest.mark.slow, pytest.mark.soak]

# One rank, by its process, sleeps in each step: the other one waits for it.
CELL = """
import os, time, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
slow = os.getpid() == SLOW
accelerator = Accelerator()
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
loader = DataLoader(TensorDataset(torch.randn(4000, 4)), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
sizes = []
for epoch in range(40):
    for (x,) in loader:
        if slow:
            time.sleep(0.1)
        accelerator.backward((model(x) - 1).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(world_size)
        time.sleep(0.005)
    if world_size == 1 and epoch:
        break
"""


@pytest.mark.parametrize("is_leaders", [False, True])
def test_a_run_goes_on_without_its_slow_host(own_agent: Callable[..., AgentProcess], is_leaders: bool) -> None:
    leader, other = own_agent(slots=1), own_agent(slots=1)
    ranks = Ranks(leader, 2, shares=[(leader, 1), (other, 1)])
    slow = 0 if is_leaders else 1
    code = CELL.replace("SLOW", str(ranks.pids()[slow]))
    options: dict[str, Any] = {"elastic": "1:2", "max_restarts": 1, "checkpoint_every": 50, "hang_after_s": 60.0}
    running = ranks.send(code, spec={"watch": "straggler=scale", "elastic": "1:2"}, **options)
    outcome = running.end()
    record = outcome.record
    assert outcome.state == "finished", (record.errors, record.history)
    assert (record.num_restarts, record.num_resizes, record.world_size) == (0, 1, 1)
    assert [size for size, _ in groupby(ranks.pull("sizes"))] == [2, 1]
    marks = list(read_all(outcome.folder.marks))
    [alert] = [mark for mark in marks if mark["mark"] == "alert"]
    assert alert["text"].endswith("; the run goes on without its host (--watch straggler=scale)")
    [resize] = [mark for mark in marks if mark["mark"] == "resize"]
    assert resize["text"].startswith(f"rank {slow} is slow, its host is left out; resumed from step ")
    ranks.end()


def test_another_leader_leaves_out_the_same_host(own_agent: Callable[..., AgentProcess]) -> None:
    """The leader's own host is left out, and the leader is killed then: who goes on with the run knows of it."""
    leader, other = own_agent(slots=1), own_agent(slots=1)
    ranks = Ranks(leader, 2, shares=[(leader, 1), (other, 1)])
    code = CELL.replace("SLOW", str(ranks.pids()[0]))
    options: dict[str, Any] = {"elastic": "1:2", "max_restarts": 1, "checkpoint_every": 50, "hang_after_s": 60.0}
    running = ranks.send(code, spec={"watch": "straggler=scale", "elastic": "1:2"}, **options)
    folder, slow = running.outcome.folder, agent_key(socket.gethostname(), leader.address)
    asked = asyncio.run(_led_on(leader, other, folder))
    record = folder.read()
    assert record.state == "finished", (record.errors, record.history)
    assert (record.agent, record.world_size, record.agents_left_out) == (other.address, 1, [slow])
    assert asked and all(place.without == [slow] for place in asked)
    ranks.beside(other).end()


async def _led_on(leader: AgentProcess, other: AgentProcess, folder: RunFolder) -> list[PlaceRanks]:
    """Kill the leader when its host is left out; what the other one asks its worker for until the run has ended."""
    asked: list[PlaceRanks] = []
    responder = Responder("the worker")
    place = {"address": other.address, "home": other.address, "num_ranks": 1, "host": "there"}

    def found(request: PlaceRanks) -> Placement:
        asked.append(request)
        if folder.read().num_resizes > 1:  # it goes on there, and would have a second rank
            raise CapacityError("the cluster holds 1 rank beside what is left out.")
        return Placement(agents=[place])

    responder.on(PlaceRanks, found)
    responder.on(FindStandby, lambda _: StandbyFound(address=""))
    connection = await AgentConnection.open(other.address, responder=responder)
    await connection.request(RenewLease(finds_capacity=True))
    await asyncio.to_thread(until, lambda: _goes_on(folder), "the run goes on without the host", 120)
    leader.process.kill()
    await asyncio.to_thread(until, lambda: not folder.read().is_active, "the run has ended", 60)
    await connection.close()
    return asked


def _goes_on(folder: RunFolder) -> bool:
    """Whether a checkpoint was saved since the host was left out: who stands by has been told of the term by then."""
    marks = [mark["mark"] for mark in read_all(folder.marks)] if folder.marks.exists() else []
    return "resize" in marks and "checkpoint" in marks[marks.index("resize") :]
