"""Agents are reached through Dask's own connection where their sockets are not on this host."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import pytest

from jupyter_llmcloud.agent.client import AgentChannel
from jupyter_llmcloud.cluster.pool import ClusterPool
from jupyter_llmcloud.core.frames import Message
from jupyter_llmcloud.core.messages import Execute, Journaled, RunEnded, StartWorld, StopWorld
from jupyter_llmcloud.storage.runs import RunStore

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_root")]


@contextlib.asynccontextmanager
async def far_cluster() -> AsyncIterator[ClusterPool]:
    """Two workers, each reached as if it were on another host."""
    pool = ClusterPool(os.getpid(), 2, always_tunnel=True)
    try:
        await pool.start(workers=2, options={"slots": 1})
        yield pool
    finally:
        await pool.close()


def test_a_world_over_two_workers_runs_cells_through_tunnels() -> None:
    """Kernel to leader, and leader to follower: neither uses the other's own socket, and all output arrives."""

    async def run() -> list[Message]:
        async with far_cluster() as pool:
            placement = await pool.place(None, 2)
            homes = {agent.home for agent in await pool.agents()}
            assert not homes & {share["address"] for share in placement["agents"]}
            assert placement["agents"][1]["home"] not in homes
            return await asyncio.to_thread(_run_a_cell, placement)

    heard = asyncio.run(run())
    text = "".join(r["text"] for m in heard if isinstance(m, Journaled) for r in m.records if r["kind"] == "stdout")
    assert text.count("the sum is 3.0") == 2
    ended = heard[-1]
    assert isinstance(ended, RunEnded) and ended.state == "finished", ended


def _run_a_cell(placement: dict) -> list[Message]:
    channel = AgentChannel(placement["agents"][0]["address"])
    channel.request(StartWorld(world_id="w", agents=placement["agents"]), 120)
    code = (
        "import torch, torch.distributed as dist\nt = torch.ones(1) * (rank + 1)\n"
        "dist.all_reduce(t)\nprint('the sum is', t.item())"
    )
    folder = str(RunStore().folder("tunnelled").path)
    channel.send(Execute(world_id="w", run_id="tunnelled", name="tunnelled", code=code, folder=folder))
    heard: list[Message] = []
    while not heard or not isinstance(heard[-1], RunEnded):
        message = channel.receive(60)
        assert message is not None, heard
        heard.append(message)
    channel.request(StopWorld(world_id="w"))
    channel.close()
    return heard
