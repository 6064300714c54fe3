"""A pool of clusters as a Jupyter server holds it, for tests, chaos and bench."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable
from typing import Any

from jupyter_llmcloud.cluster.agent_info import AgentInfo
from jupyter_llmcloud.cluster.clusters import ClusterPool
from tests.support.worlds import AgentElsewhere, Ranks


class Server:
    """A pool in a loop of its own, as a Jupyter server holds it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.pool = ClusterPool(os.getpid(), 2)

    def do(self, call: Awaitable[Any], timeout_s: float = 120) -> Any:
        async def awaited() -> Any:
            return await call

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(timeout_s)

    def agents(self) -> list[AgentInfo]:
        return list(self.do(self.pool.agents()))

    def world(self, num_ranks: int, **spec: Any) -> Ranks:
        placement = self.do(self.pool.place(None, num_ranks))
        leader = AgentElsewhere(placement["agents"][0]["address"])
        return Ranks(leader, num_ranks, agents=placement["agents"], **spec)

    def end(self) -> None:
        try:
            self.do(self.pool.close())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(10)
            self.loop.close()
