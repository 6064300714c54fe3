"""Whether a run that its record calls active goes on: its leading agent knows, as long as there is one.

An agent that has ended cannot write so into the record. Whoever finds that out for certain does it in its place; of a
run with restarts not before another agent has had the time to lead it, and only by claiming to lead it (see
storage.leadership), so that none does from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING

from jupyter_llmcloud.cluster.record import saved_records
from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError, NotFound, UsageError, WorldError
from jupyter_llmcloud.protocol.agent_messages import Describe, SaveCheckpoint, StopRun
from jupyter_llmcloud.protocol.connection import is_bridge
from jupyter_llmcloud.storage.leadership import Leadership, TermClaim
from jupyter_llmcloud.storage.runs import RunRecord
from jupyter_llmcloud.system.processes import is_process

if TYPE_CHECKING:
    from jupyter_llmcloud.protocol.client import AgentConnection
    from jupyter_llmcloud.server.api.run_starts import RunStarts
    from jupyter_llmcloud.server.cluster_access import ClusterAccess
    from jupyter_llmcloud.storage.runs import RunStore
    from jupyter_llmcloud.storage.server_state import ServerState

ASK_TIMEOUT_S = 5.0
SAVE_TIMEOUT_S = 120.0
SILENT_S = 60.0  # an agent of another host that nobody reaches for so long counts as gone, until it is heard again
TAKEOVER_S = 90.0  # for another agent to lead a run whose leader has gone: see core.link.TAKES_OVER
STOP_ATTEMPTS = 3
SERVER = "server:"  # what the owner of a run begins with that no kernel started
_GONE = "its node agent has gone."


class RunStates:
    """The runs of all clusters of this server, as they truly are.

    Args:
        starts: the runs that this server is about to start.
        state: where servers are known, those that start other runs among them.
    """

    def __init__(
        self, server_id: str, runs: RunStore, clusters: ClusterAccess, starts: RunStarts, state: ServerState
    ) -> None:
        self._server_id = server_id
        self._runs = runs
        self._clusters = clusters
        self._starts = starts
        self._state = state
        self._silent_since: dict[str, float] = {}  # agents that are not reached, by their address
        self._leaderless_since: dict[str, float] = {}  # runs that no agent leads
        self._leaders: dict[tuple[str, str], str] = {}  # sockets here for agents, by their host and their socket there

    async def true_state(self, record: RunRecord) -> str:
        """The state of a run; an active one whose agent has gone, or does not know it any more, is lost."""
        if not record.is_active:
            return record.state
        if not record.agent and record.owner.startswith(SERVER):
            if self._is_starting(record):
                return record.state
            return await asyncio.to_thread(self._end, record, "lost", "the server that was to start it has gone.")
        if not record.agent and record.starter:
            if self._has_starter(record):
                return record.state
            return await asyncio.to_thread(self._end, record, "lost", "the kernel that was to start it has gone.")
        known = await self._newest(record)
        try:
            async with await self._leader(record) as connection, asyncio.timeout(ASK_TIMEOUT_S):
                worlds = (await connection.request(Describe())).worlds
        except (ConnectionLost, TimeoutError) as error:
            if isinstance(error, ConnectionLost) and self._is_gone(record, error):
                return await self._leaderless(record, _GONE, known)
            since = self._silent_since.setdefault(record.agent, time.monotonic())
            return "lost" if time.monotonic() - since > SILENT_S else record.state
        except NotFound:
            return await self._leaderless(record, _GONE, known)
        except LLMCloudError:
            return record.state
        self._silent_since.pop(record.agent, None)
        if record.world_id and record.world_id not in (world["world_id"] for world in worlds):
            return await self._leaderless(record, "its node agent was replaced; its ranks are gone.", known)
        self._leaderless_since.pop(record.run_id, None)
        return record.state

    def _is_starting(self, record: RunRecord) -> bool:
        """Whether a server that lives is about to start it."""
        if record.run_id in self._starts:
            return True
        server_id = record.owner.removeprefix(SERVER)
        return server_id != self._server_id and any(
            server["id"] == server_id and is_process(server["pid"], server["started"])
            for server in self._state.servers()
        )

    @staticmethod
    def _has_starter(record: RunRecord) -> bool:
        """Whether the kernel that looks for its ranks may live."""
        starter = record.starter
        return starter["host"] != socket.gethostname() or is_process(starter["pid"], starter["started"])

    async def stop(self, record: RunRecord) -> str:
        """Press Stop for an active run, also when no agent leads it now; returns its state. Raises LLMCloudError."""
        if record.run_id in self._starts and await self._starts.stop(record.run_id):
            return self._runs.folder(record.run_id).read().state
        record = self._runs.folder(record.run_id).read()
        if not record.agent and record.starter and self._has_starter(record):
            raise UsageError(f"run {record.run_id!r} has no ranks yet: interrupt the kernel that starts them (Stop).")
        for _ in range(STOP_ATTEMPTS):
            known = await self._newest(record)
            try:
                async with await self._leader(record) as connection:
                    await connection.request(StopRun(run_id=record.run_id))
                return "stopping"
            except (ConnectionLost, NotFound) as error:
                gone = isinstance(error, NotFound) or self._is_gone(record, error)
                if not gone or not Leadership(self._runs.folder(record.run_id).path).can_be_taken:
                    raise
            state = await asyncio.to_thread(self._end, record, "stopped", "stopped while no agent led it.", known)
            if state == "stopped":
                return state
            record = self._runs.folder(record.run_id).read()  # another agent leads it by now
        raise WorldError(f"run {record.run_id!r} changes its leading agent now. Press Stop again.")

    async def save(self, record: RunRecord) -> int:
        """Have a checkpoint of a run that goes on; returns its step when it is complete. Raises LLMCloudError."""
        async with await self._leader(record) as connection:
            return (await connection.request(SaveCheckpoint(run_id=record.run_id), SAVE_TIMEOUT_S)).step

    async def leader_address(self, record: RunRecord) -> str:
        """A socket on this host for the agent that leads a run. Raises NotFound when the cluster does not know it.

        Raises ConnectionLost where that is a cluster of another server of this user.
        """
        if not record.host or (record.host == socket.gethostname() and os.path.exists(record.agent)):
            return record.agent
        key = (record.host, record.agent)
        if key not in self._leaders:
            pool = await self._clusters.pool()
            try:
                agents = await pool.agents(record.cluster or None)
            except NotFound:
                if await asyncio.to_thread(_is_elsewhere, record.cluster):
                    raise ConnectionLost(f"cluster {record.cluster!r} is one of another server here.") from None
                raise
            found = [agent.address for agent in agents if (agent.host, agent.home) == key]
            if not found:
                raise NotFound(f"the agent at {record.agent} on {record.host} is not in cluster {record.cluster!r}.")
            self._leaders[key] = found[0]
        return self._leaders[key]

    async def _leader(self, record: RunRecord) -> AgentConnection:
        return await self._clusters.agent(await self.leader_address(record))

    def _is_gone(self, record: RunRecord, error: ConnectionLost) -> bool:
        """Whether its agent has gone for certain: nobody listens at its socket, and that is no bridge of a server that
        is away for a moment. With its cluster the folder of a bridge goes."""
        address = self._leaders.get((record.host, record.agent), record.agent)
        return not connected(error) and not (is_bridge(address) and os.path.isdir(os.path.dirname(address)))

    async def _newest(self, record: RunRecord) -> TermClaim | None:
        """Who leads the run by its folder, read before it is asked: whoever claims it afterwards was not asked."""
        return await asyncio.to_thread(Leadership(self._runs.folder(record.run_id).path).newest)

    async def _leaderless(self, record: RunRecord, why: str, known: TermClaim | None) -> str:
        """No agent leads the run now: another one may still come to lead it, or it is lost."""
        if Leadership(self._runs.folder(record.run_id).path).can_be_taken:
            now = time.monotonic()
            if now - self._leaderless_since.setdefault(record.run_id, now) < TAKEOVER_S:
                return record.state
        return await asyncio.to_thread(self._end, record, "lost", why, known)

    def _end(self, record: RunRecord, state: str, why: str, known: TermClaim | None = None) -> str:
        """Write the end down, unless it has ended or another than `known` has come to lead it; returns its state.

        `record` may be of a while ago: what was found out of its agent says nothing of one that has it since.
        """
        folder = self._runs.folder(record.run_id)
        try:
            now = folder.read()
        except NotFound:  # somebody removes it
            return "lost"
        if not now.is_active or (now.agent, now.host, now.world_id) != (record.agent, record.host, record.world_id):
            return now.state
        leadership = Leadership(folder.path)
        with contextlib.suppress(OSError):
            if known is not None and not leadership.claim(TermClaim(known.term + 1)):
                return now.state
            now.state, now.ended = state, time.time()
            now.history.append({"t": round(now.ended, 3), "state": state, "why": why})
            folder.write(now)
            leadership.forget()
        return state


def _is_elsewhere(cluster: str) -> bool:
    """Whether another server of this user on this host has a cluster of this name."""
    return any(record.name == cluster and (record.has_owner or record.has_agents) for record in saved_records())


def connected(error: ConnectionLost) -> bool:
    """Whether somebody listened at all: nobody does at the socket of an agent that has ended."""
    return not isinstance(error.__context__, FileNotFoundError | ConnectionRefusedError)
