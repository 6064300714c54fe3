"""`%cluster adapt MIN MAX`: workers for the tasks of Dask, and for ranks and replicas, which are no tasks.

Dask sees a worker whose agent trains as idle, and would end it. Here workers that hold anything stay, and an elastic
run that could have more ranks asks for workers.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from distributed import Client
from distributed.deploy import Adaptive

from jupyter_llmcloud.cluster.worker_plugin import agent_load, agents_there
from jupyter_llmcloud.core.scheduling.elasticity import WorkerLoad, workers_to_close, workers_wanted
from jupyter_llmcloud.errors import ConnectionLost
from jupyter_llmcloud.protocol.agent_messages import Shutdown
from jupyter_llmcloud.protocol.client import AgentConnection

ASK_TIMEOUT_S = 10.0


class RankAdaptive(Adaptive):
    """As Dask's, with what agents say of themselves.

    Args:
        client: of the cluster.
    """

    def __init__(self, cluster: Any, *, client: Client, **options: Any) -> None:
        self._client = client
        super().__init__(cluster, **options)

    async def _loads(self) -> dict[Any, WorkerLoad]:
        """By the names of workers. One that does not answer is taken to hold something."""
        scheduler: Any = self._client.scheduler
        names = {address: row["name"] for address, row in (await scheduler.identity())["workers"].items()}
        rows: dict[str, Any] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_TIMEOUT_S):
                rows = await self._client.run(agent_load, on_error="return")
        silent = WorkerLoad(1, 0, True)
        found = {name: rows.get(address) for address, name in names.items()}
        return {name: WorkerLoad(**row) if isinstance(row, dict) else silent for name, row in found.items()}

    async def target(self) -> int:
        """How many workers there should be."""
        for_tasks = int(await super().target())
        return max(for_tasks, workers_wanted((await self._loads()).values()))

    async def recommendations(self, target: int) -> dict[str, Any]:
        """As Dask's, and another worker for one that was lost: of those only that they were asked for is counted."""
        found: dict[str, Any] = await super().recommendations(target)
        if found["status"] == "same" and len(self.requested) < min(target, len(self.plan)):
            return {"status": "up", "n": target}
        return found

    async def workers_to_close(self, target: int) -> list[Any]:
        """Only workers that neither Dask nor an agent has work for."""
        loads = await self._loads()
        idle = set(await super().workers_to_close(target))
        return workers_to_close({name: load for name, load in loads.items() if name in idle}, len(loads) - target)

    async def scale_down(self, workers: list[Any]) -> None:  # type: ignore[override]  # as Dask's own, which says int
        """End workers, and the agents beside them, which would outlive them."""
        before = {row["name"]: row["address"] for row in (await agents_there(self._client)).values() if row}
        await super().scale_down(workers)
        for name in workers:
            with contextlib.suppress(ConnectionLost, KeyError):
                async with await AgentConnection.open(before[str(name)], 2) as connection:
                    await connection.request(Shutdown(cluster_stays=True), 5)
