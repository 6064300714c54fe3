"""A killed scheduler does not end training: its place is taken, the ranks are the same processes."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from jupyter_llmcloud.agent.client import AgentConnection
from jupyter_llmcloud.cluster.pool import ClusterPool
from jupyter_llmcloud.core.messages import DescribeWorld, StartWorld

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_root")]


def test_ranks_outlive_the_scheduler_and_control_is_back() -> None:
    """SIGKILL to the process that holds scheduler and nannies; the next question finds the cluster again."""

    async def run() -> tuple[list[int], list[int]]:
        pool = ClusterPool(os.getpid(), 5)
        try:
            record = await pool.start()
            placement = await pool.place(None, 2)
            async with await AgentConnection.open(placement["agents"][0]["address"]) as connection:
                await connection.request(StartWorld(world_id="w", agents=placement["agents"]), 120)
                before = await _pids(connection)
                os.kill(record.pid, signal.SIGKILL)
                async with asyncio.timeout(30):
                    (again,) = await pool.list()
                assert again.state == "running" and again.pid != record.pid
                assert (await pool.place(None, 2))["agents"][0]["address"] == placement["agents"][0]["address"]
                return before, await _pids(connection)
        finally:
            await pool.close()

    before, after = asyncio.run(run())
    assert before == after


async def _pids(connection: AgentConnection) -> list[int]:
    description = (await connection.request(DescribeWorld(world_id="w"))).values
    return [row["pid"] for row in description["ranks"]]
