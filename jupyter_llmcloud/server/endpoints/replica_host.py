"""Where replicas run: placed on a cluster, started, looked for and ended by the node agents there."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jupyter_llmcloud.core.scheduling.replica_room import ReplicaNeeds
from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.errors import ConnectionLost, NotFound
from jupyter_llmcloud.protocol.agent_messages import DescribeReplicas, EndReplica, LaunchReplica
from jupyter_llmcloud.storage.server_state import StoredReplica

if TYPE_CHECKING:
    from jupyter_llmcloud.cluster.agent_info import AgentInfo
    from jupyter_llmcloud.cluster.clusters import ClusterPool
    from jupyter_llmcloud.protocol.client import AgentConnection

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0


class ReplicaGone(Exception):
    """The process of a replica has ended. `lasting`: it decided to, and another one would again."""

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class PlacedReplica:
    """A replica that is not started yet, and the agent that will start it."""

    replica: StoredReplica
    agent: AgentInfo


class ReplicaHost:
    """The clusters of a server, as far as replicas need them."""

    def __init__(
        self,
        pool: Callable[[], Awaitable[ClusterPool]],
        open_agent: Callable[[str], Awaitable[AgentConnection]],
    ) -> None:
        self._pool = pool
        self._open_agent = open_agent

    async def place(self, endpoint: str, revision: Revision, cluster: str | None) -> PlacedReplica:
        """Choose an agent for a replica that is not started yet; with no cluster a local one is started."""
        name, agent = await (await self._pool()).agent_for_replica(
            cluster, needs_of(revision), f"replica of {endpoint}", revision.priority
        )
        replica = StoredReplica(
            id=f"{endpoint[:40]}-{secrets.token_hex(4)}",
            revision=revision.number,
            cluster=name,
            agent=agent.address,
            token=secrets.token_urlsafe(32),
        )
        return PlacedReplica(replica, agent)

    async def start(
        self, endpoint: str, revision: Revision, placed: PlacedReplica, adapters: Mapping[str, str]
    ) -> StoredReplica:
        """Start its process; `adapters` are folders by their names."""
        replica = placed.replica
        spec = {
            "endpoint": endpoint, "served_name": endpoint, "model": revision.model, "dtype": revision.dtype,
            "base_model": revision.base_model, "token": replica.token, "max_concurrent": revision.max_concurrent,
            "max_model_len": revision.max_model_len,
            "num_threads": _threads(revision),
            "cores": revision.cores, "memory_bytes": revision.memory_bytes, "cache_bytes": revision.cache_bytes,
            "devices": revision.devices, "engine": revision.engine, "source": revision.source,
            "api_key_env": revision.api_key_env,
            "adapters": dict(adapters),
        }  # fmt: skip
        async with await self._open_agent(replica.agent) as connection:
            message = LaunchReplica(endpoint=endpoint, replica_id=replica.id, spec=spec)
            started = await connection.request(message, timeout_s=START_TIMEOUT_S)
        return await self._reached(replica, placed.agent, started.pid, started.socket, started.log)

    async def find(self, replica: StoredReplica, was_ready: bool = False) -> StoredReplica:
        """A replica as its agent knows it; raises ReplicaGone when there is no process that will ever answer.

        One that was ended for its memory before it `was_ready` would be again.
        """
        try:
            async with await self._open_agent(replica.agent) as connection:
                rows = (await connection.request(DescribeReplicas())).replicas
        except ConnectionLost as error:
            raise ReplicaGone(f"replica {replica.id}: {error}") from None
        known = next((row for row in rows if row["replica_id"] == replica.id), None)
        if known is None:
            raise ReplicaGone(f"replica {replica.id} is not known to its agent any more")
        if (code := known.get("exit_code")) is not None:
            if why := known.get("reason"):
                raise ReplicaGone(f"replica {replica.id}: {why}", lasting=not was_ready)
            ending = f"replica {replica.id} ended with {code}{'' if was_ready else ' before it was ready'}"
            if code > 0 and not was_ready:
                raise ReplicaGone(f"{ending}: {await asyncio.to_thread(last_line, replica.log)}", lasting=True)
            raise ReplicaGone(f"{ending}. Its log: {replica.log}")
        if known["socket"] != replica.home or not replica.socket:
            agent = await self._agent_of(replica)
            return await self._reached(replica, agent, known["pid"], known["socket"], known["log"])
        return replica

    async def _agent_of(self, replica: StoredReplica) -> AgentInfo:
        agents = await (await self._pool()).agents(replica.cluster or None)
        found = next((agent for agent in agents if agent.address == replica.agent), None)
        if found is None:
            raise ReplicaGone(f"replica {replica.id}: its agent is not in cluster {replica.cluster!r} any more")
        return found

    async def _reached(self, replica: StoredReplica, agent: AgentInfo, pid: int, home: str, log: str) -> StoredReplica:
        """With its process and its socket, and the socket here that leads to it: a bridge, from another host."""
        pool = await self._pool()
        socket = await pool.reach_replica(replica.cluster or None, agent, home)
        return dataclasses.replace(replica, pid=pid, log=log, home=home, socket=socket)

    async def stop(self, replica: StoredReplica) -> None:
        """End its process. Raises ConnectionLost when its agent does not answer; one that is gone already is fine."""
        async with await self._open_agent(replica.agent) as connection:
            try:
                await connection.request(EndReplica(replica_id=replica.id), timeout_s=STOP_TIMEOUT_S)
            except NotFound:
                return


def needs_of(revision: Revision) -> ReplicaNeeds:
    """What each replica of a revision was promised."""
    return ReplicaNeeds(revision.cores, revision.memory_bytes, revision.devices)


def _threads(revision: Revision) -> int | None:
    """Of a replica with cores of its own: one is left to HTTP, where there is more than one. None: its share."""
    return revision.threads or (None if revision.cores is None else max(1, revision.cores - 1))


def last_line(log: str) -> str:
    """What a process said last."""
    try:
        data = Path(log).read_bytes()[-4096:].decode(errors="replace")
    except OSError:
        return "its log cannot be read here"
    lines = [line for line in data.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "its log is empty"
