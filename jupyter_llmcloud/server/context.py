"""What the handlers of one server share: state, clusters, runs, endpoints, audit."""

from __future__ import annotations

import asyncio
import importlib
import os
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from jupyter_llmcloud import config
from jupyter_llmcloud.server.api.run_starts import RunStarts
from jupyter_llmcloud.server.audit import Audit
from jupyter_llmcloud.server.endpoints.registry import EndpointKeeper
from jupyter_llmcloud.server.gateway.open_requests import OpenRequests
from jupyter_llmcloud.storage.runs import RunStore
from jupyter_llmcloud.storage.server_state import ServerState
from jupyter_llmcloud.system.processes import is_process

if TYPE_CHECKING:
    from logging import Logger
    from pathlib import Path

    from jupyter_events import EventLogger

    from jupyter_llmcloud.cluster.clusters import ClusterPool
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


class ServerContext:
    """Everything behind the routes. Starts with the first request that needs it, or with the server's loop."""

    def __init__(
        self,
        log: Logger,
        event_logger: EventLogger | None = None,
        identity: Identity | None = None,
        root_dir: Path | None = None,
    ) -> None:
        self.log = log
        self.identity = identity or Identity()
        self.root_dir = root_dir
        self.server_id = uuid.uuid4().hex[:16]
        self.state = ServerState()
        self.audit = Audit(self.state, event_logger)
        self.runs = RunStore()
        self.silent_since: dict[str, float] = {}  # agents that are not reached, by their address
        self.leaderless_since: dict[str, float] = {}  # runs that no agent leads
        self.leaders: dict[tuple[str, str], str] = {}  # sockets here for agents, by their host and their socket there
        self.open_agent: Callable[[str], Awaitable[AgentConnection]] = open_agent
        self.make_pool: Callable[[], Awaitable[ClusterPool]] = self._make_pool
        self.endpoints = EndpointKeeper(self)
        self.starts = RunStarts(self.runs, f"server:{self.server_id}", self.pool, self._open)
        self.requests = OpenRequests(self.state, log)
        self._pool: asyncio.Task[Any] | None = None
        self._started: asyncio.Task[None] | None = None
        self._closed = False

    async def _open(self, address: str) -> AgentConnection:
        return await self.open_agent(address)

    async def pool(self) -> ClusterPool:
        """The clusters of this server; what is needed for them is imported with the first call."""
        if self._pool is None or (self._pool.done() and self._pool.exception() is not None):
            self._pool = asyncio.ensure_future(self.make_pool())
        pool: ClusterPool = await asyncio.shield(self._pool)
        return pool

    async def cluster_names(self) -> set[str]:
        """The clusters there are; none before anything needed one."""
        if self._pool is None:
            return set()
        return {record.name for record in await (await self.pool()).list()}

    async def _make_pool(self) -> ClusterPool:
        # distributed takes most of a second to import: not on the loop that serves notebooks.
        module = await asyncio.to_thread(importlib.import_module, "jupyter_llmcloud.cluster.clusters")
        owner = self.identity.owner_pid or os.getpid()
        pool: ClusterPool = module.ClusterPool(
            owner_pid=owner,
            lease_s=config.lease_s(HEADLESS_LEASE_S if self.identity.headless else CLUSTER_LEASE_S),
            begun_cluster_id=self.identity.begun_cluster_id,
        )
        if not self.identity.headless:  # which ends its clusters with itself, so none that is not its own
            await pool.restore()
        return pool

    async def started(self) -> None:
        """Wait until the endpoints that this server inherits are known again."""
        if self._started is None:
            self._started = asyncio.ensure_future(self._start())
        await asyncio.shield(self._started)

    async def _start(self) -> None:
        me = psutil.Process()
        self.state.register_server(self.server_id, me.pid, me.create_time(), self.identity.headless)
        self._inherit()
        await self.endpoints.start()

    def _inherit(self) -> None:
        """Take over the endpoints of servers that are gone; those of a headless server went with it."""
        for server in self.state.servers():
            if server["id"] == self.server_id or is_process(server["pid"], server["started"]):
                continue
            if self.identity.headless and not server["headless"]:
                continue  # left for the Jupyter server that follows it
            if not server["headless"]:
                self.state.adopt_endpoints(server["id"], self.server_id)
            self.state.forget_server(server["id"])

    async def _made_pool(self) -> ClusterPool | None:
        """The pool, if one was asked for and could be made."""
        if self._pool is None:
            return None
        await asyncio.wait([self._pool])
        return None if self._pool.exception() is not None else self._pool.result()

    async def close(self) -> None:
        """The server ends: a headless one takes its endpoints and clusters along, any other leaves them running."""
        if self._closed:
            return
        self._closed = True
        if self._started is not None:
            await asyncio.gather(self._started, return_exceptions=True)
        await self.starts.close()
        await self.requests.close()
        await self.endpoints.close(stop=self.identity.headless)
        pool = await self._made_pool()
        if self.identity.headless:
            if pool is not None:
                await pool.close()
            self.state.forget_server(self.server_id)
        else:
            if pool is not None:
                await pool.release()
            self.state.register_server(self.server_id, 0, 0.0, headless=False)  # to be adopted
        self.state.close()
