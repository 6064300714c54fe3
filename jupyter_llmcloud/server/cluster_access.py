"""The clusters of a server: imported and taken up when something needs one, and not before."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud import config
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.connection import is_bridge

if TYPE_CHECKING:
    from jupyter_llmcloud.cluster.clusters import ClusterPool
    from jupyter_llmcloud.core.scheduling.priorities import Shortage
    from jupyter_llmcloud.protocol.client import AgentConnection

CLUSTER_LEASE_S = 300.0  # for a Jupyter server that is restarted; a headless one has its own
HEADLESS_LEASE_S = 15.0


@dataclass(frozen=True)
class Identity:
    """Which server this is, and whether it goes with its kernel."""

    headless: bool = False
    owner_pid: int = 0
    begun_cluster_id: str = ""  # of a local cluster whose agents were started ahead of this server


async def open_agent(address: str) -> AgentConnection:
    """A connection to a node agent; raises ConnectionLost."""
    client = importlib.import_module("jupyter_llmcloud.protocol.client")
    connection: AgentConnection = await client.AgentConnection.open(address)
    return connection


class ClusterAccess:
    """The pool of clusters, made at its first use.

    Attributes:
        make_pool: makes it.
        on_shortage: told of worlds that wait for slots.
        open_agent: connects to a node agent.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._pool: asyncio.Task[Any] | None = None
        self.make_pool: Callable[[], Awaitable[ClusterPool]] = self._make_pool
        self.on_shortage: Callable[[Shortage], None] = lambda _: None
        self.open_agent: Callable[[str], Awaitable[AgentConnection]] = open_agent

    async def pool(self) -> ClusterPool:
        """The clusters of this server; what is needed for them is imported with the first call."""
        if self._pool is None or (self._pool.done() and self._pool.exception() is not None):
            self._pool = asyncio.ensure_future(self.make_pool())
        pool: ClusterPool = await asyncio.shield(self._pool)
        pool.on_shortage = self.on_shortage
        return pool

    async def agent(self, address: str) -> AgentConnection:
        """A connection to the node agent at `address`; raises ConnectionLost."""
        if is_bridge(address):  # which a server before this one may have left: it stands again with the pool
            await self.pool()
        return await self.open_agent(address)

    async def names(self) -> set[str]:
        """The clusters there are; none before anything needed one."""
        if self._pool is None:
            return set()
        return {record.name for record in await (await self.pool()).list()}

    async def _make_pool(self) -> ClusterPool:
        # distributed takes most of a second to import: not on the loop that serves notebooks.
        module = await asyncio.to_thread(importlib.import_module, "jupyter_llmcloud.cluster.clusters")
        try:
            await asyncio.to_thread(config.runtime_dir)
        except PermissionError as error:  # says what to do about it
            raise UsageError(str(error)) from None
        headless = self._identity.headless
        pool: ClusterPool = module.ClusterPool(
            owner_pid=self._identity.owner_pid or os.getpid(),
            lease_s=config.lease_s(HEADLESS_LEASE_S if headless else CLUSTER_LEASE_S),
            begun_cluster_id=self._identity.begun_cluster_id,
        )
        if not headless:  # which ends its clusters with itself, so none that is not its own
            await pool.restore()
        return pool

    async def _made_pool(self) -> ClusterPool | None:
        """The pool, if one was asked for and could be made."""
        if self._pool is None:
            return None
        await asyncio.wait([self._pool])
        return None if self._pool.exception() is not None else self._pool.result()

    async def close(self) -> None:
        """The server ends: a headless one ends its clusters, any other leaves them to the next."""
        pool = await self._made_pool()
        if pool is not None:
            await (pool.close() if self._identity.headless else pool.release())
