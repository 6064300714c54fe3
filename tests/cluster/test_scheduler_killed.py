"""A killed scheduler does not end training: its place is taken, the ranks are the same processes."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from jupyter_llmcloud.cluster.clusters import ClusterPool
from jupyter_llmcloud.protocol.agent_messages import Describe, DescribeWorld, Execute, StartWorld, StopRun
from jupyter_llmcloud.protocol.client import AgentConnection
from jupyter_llmcloud.storage.runs import RunFolder, RunStore

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_root")]
COUNT = "import time\nfor i in range(10**6):\n    run.log(x=1.0, step=i)\n    time.sleep(0.02)"


@pytest.mark.story
def test_ranks_outlive_the_scheduler_and_control_is_back() -> None:
    """SIGKILL to the process that holds scheduler and nannies: a run trains on, and the next question finds the cluster.

    There is one agent, one world and one copy of the run all the time: no step is logged twice, none is missing.
    """

    async def run() -> tuple[list[int], list[int]]:
        pool = ClusterPool(os.getpid(), 5)
        try:
            record = await pool.start()
            placement = await pool.place(None, 2)
            async with await AgentConnection.open(placement["agents"][0]["address"]) as connection:
                await connection.request(StartWorld(world_id="w", agents=placement["agents"]), 120)
                before = await _pids(connection)
                folder = RunStore().folder("trains-on")
                names = {"world_id": "w", "run_id": folder.run_id, "name": folder.run_id}
                await connection.request(Execute(code=COUNT, folder=str(folder.path), background=True, **names))
                await _trains(folder)
                os.kill(record.pid, signal.SIGKILL)
                await _trains(folder)
                async with asyncio.timeout(30):
                    (again,) = await pool.list()
                assert again.state == "running" and again.pid != record.pid
                assert (await pool.place(None, 2))["agents"][0]["address"] == placement["agents"][0]["address"]
                await _trains(folder)
                await connection.request(StopRun(run_id="trains-on"))
                while folder.read().is_active:
                    await asyncio.sleep(0.02)
                for rank in (0, 1):
                    assert _steps(folder, rank) == [*range(len(_steps(folder, rank)))]
                assert (await connection.request(Describe())).worlds[0]["world_size"] == 2
                return before, await _pids(connection)
        finally:
            await pool.close()

    before, after = asyncio.run(run())
    assert before == after


def _steps(folder: RunFolder, rank: int = 0) -> list[int]:
    return [record["step"] for number, record in folder.records("metrics") if number == rank]


async def _trains(folder: RunFolder) -> None:
    """Ten more steps are taken from now on."""
    before = len(_steps(folder))
    async with asyncio.timeout(30):
        while len(_steps(folder)) < before + 10:
            await asyncio.sleep(0.02)


async def _pids(connection: AgentConnection) -> list[int]:
    description = (await connection.request(DescribeWorld(world_id="w"))).as_dict()
    return [row["pid"] for row in description["ranks"]]
