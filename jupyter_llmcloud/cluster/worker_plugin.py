"""The worker plugin: starts the node agent of a worker, or adopts the one that outlived the worker before it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from distributed import Client, Worker, WorkerPlugin
from distributed.comm.core import Comm
from distributed.core import Status

from jupyter_llmcloud.cluster.agent_launcher import agent_folder, ensure_agent, living_agent
from jupyter_llmcloud.cluster.tunnel.bridge import Bridges, is_here
from jupyter_llmcloud.cluster.tunnel.relay import TUNNEL, SocketRoutes, answer_tunnel
from jupyter_llmcloud.core.scheduling.placement import AgentSlots, agent_key, place
from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError, WorldError
from jupyter_llmcloud.protocol.agent_messages import (
    Describe,
    FindStandby,
    Placement,
    PlaceRanks,
    RenewLease,
    Shutdown,
    StandbyFound,
)
from jupyter_llmcloud.protocol.client import AgentConnection
from jupyter_llmcloud.protocol.rpc import Responder
from jupyter_llmcloud.system.processes import is_process

DESCRIBE_TIMEOUT_S = 5.0
END_TIMEOUT_S = 10.0
ASK_AGAIN_S = 2.0
REPLACE_ATTEMPTS, REPLACE_AGAIN_S = 100, 0.05
AWAY_S = 60.0  # batch systems kill what is left of a job half a minute after they have told it to end, as a rule
DESCRIBE = "llmcloud_describe"  # an operation of a worker
PLUGIN_NAME = "llmcloud-agent"


class AgentPlugin(WorkerPlugin):
    """One agent per worker, in a session of its own: it outlives the worker.

    Args:
        cluster_id: names the folder of the agent's socket.
        num_slots: slots on a host without GPUs (default: its cores, at least 8).
    """

    name = PLUGIN_NAME
    idempotent = True

    def __init__(self, cluster_id: str, num_slots: int | None = None) -> None:
        self.cluster_id = cluster_id
        self.num_slots = num_slots
        self.info: dict[str, Any] = {}
        self._connection: AgentConnection | None = None
        self._folder = Path()
        self._bridges: Bridges | None = None
        self._holding = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._ended: AgentConnection | None = None  # of whose end is known what it was
        self._away_until = 0.0  # seconds of the loop's clock

    async def setup(self, worker: Worker) -> None:
        """Called by Dask when the worker starts."""
        self._folder = agent_folder(self.cluster_id, worker.name)
        args = worker.security.get_connection_args("worker")
        self._bridges = Bridges(self._folder, SocketRoutes(lambda: str(worker.scheduler.address), lambda: args))

        async def describe(at_once: bool = False) -> dict[str, Any]:
            return await (self._describe_at_once() if at_once else self.describe(worker))

        worker.handlers[TUNNEL] = self._answer_tunnel
        worker.handlers[DESCRIBE] = describe
        await self.hold(worker)
        await self._bridges.restore()  # the agent's own leader or followers may still speak through them

    @property
    def _is_coming_up(self) -> bool:
        """Whether there is no agent yet, or the one before it was killed."""
        has_none = self._connection is None or self._connection.gone.is_set()
        return has_none or self._holding.locked() or living_agent(self._folder) is None

    async def hold(self, worker: Worker) -> dict[str, Any]:
        """See to it that there is an agent and that it has a worker; returns what it said of itself.

        Raises ConnectionLost where it was told to end, and its worker ends soon as well.
        """
        async with self._holding:
            if self._has_left():
                raise ConnectionLost(f"the node agent of worker {worker.name} was told to end: its host is taken away.")
            if self._connection is None or self._connection.gone.is_set() or living_agent(self._folder) is None:
                self._ended = self._connection  # killed: what starts another one removes its file
                known = await ensure_agent(self._folder, worker.name, _interface(worker), self.num_slots)
                self.info = {**known, "worker": worker.address}
                await self._let_go()
                responder = self._make_responder(worker)
                connection = self._connection = await AgentConnection.open(self.info["address"], responder=responder)
                await connection.request(RenewLease(finds_capacity=True))  # held while this connection is open
                self._watching = asyncio.create_task(self._watch(worker, connection))
        return self.info

    def _has_left(self) -> bool:
        """Whether the agent was told to end, a short while ago: only who ends by itself removes that file."""
        now, connection = asyncio.get_running_loop().time(), self._connection
        is_listed = (self._folder / "agent.json").exists()
        if connection is not None and connection is not self._ended and (connection.gone.is_set() or not is_listed):
            self._ended = connection
            if not is_listed:
                self._away_until = now + AWAY_S
        return now < self._away_until

    async def _watch(self, worker: Worker, connection: AgentConnection) -> None:
        """Replace an agent that is killed as soon as it is: it may have led runs, which the new one goes on with.

        One that was told to end is not: with a batch system's job, say. Another one would claim its runs here, and be
        killed with the job in the next moment. But where the worker stays, it has an agent again.
        """
        await connection.gone.wait()
        async with self._holding:  # who is replacing it has removed its file, which says nothing of its end
            has_left = self._has_left()
        if has_left:
            await asyncio.sleep(AWAY_S)
        self._watching = None
        for _ in range(REPLACE_ATTEMPTS):
            try:
                await self.hold(worker)
                return
            except (ConnectionLost, WorldError, TimeoutError):  # one that is killed closes its socket before it ends
                await asyncio.sleep(REPLACE_AGAIN_S)

    async def _let_go(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if self._connection is not None:
            await self._connection.close()

    async def _answer_tunnel(self, comm: Comm, target: str) -> Status:
        return await answer_tunnel(comm, self._folder, target)

    async def describe(self, worker: Worker) -> dict[str, Any]:
        """What the agent says of itself now."""
        info = await self.hold(worker)
        assert self._connection is not None
        return {**info, **(await self._connection.request(Describe(), DESCRIBE_TIMEOUT_S)).as_dict()}

    async def _describe_at_once(self) -> dict[str, Any]:
        """As `describe`; nothing of an agent that was killed or comes up: the one in its place is not waited for."""
        connection = self._connection
        if connection is None or self._is_coming_up:
            return {}
        try:
            row = {**self.info, **(await connection.request(Describe(), DESCRIBE_TIMEOUT_S)).as_dict()}
        except ConnectionLost:
            return {}
        return row if row["is_warm"] else {}

    async def bridge_to(self, info: dict[str, Any], always: bool = False) -> str:
        """A socket on this worker's host by which its agent reaches another one: that one's own, or a bridge."""
        target = str(info["address"])
        if is_here(info["host"], target) and not always:
            return target
        assert self._bridges is not None
        return await self._bridges.reach(info["worker"], info["name"], target)

    def _make_responder(self, worker: Worker) -> Responder:
        """What the agent may ask about the others that its worker's scheduler knows."""

        async def find_capacity(asked: PlaceRanks) -> Placement:
            return await self._place(asked, await _all_agents(worker, asked.at_once))

        async def find_standby(_: FindStandby) -> StandbyFound:
            return await self._another(await _all_agents(worker))

        responder = Responder(f"the Dask worker {worker.name}")
        responder.on(PlaceRanks, find_capacity)
        responder.on(FindStandby, find_standby)
        return responder

    async def _place(self, asked: PlaceRanks, agents: dict[str, dict[str, Any]]) -> Placement:
        slots = [
            AgentSlots(key, row["host"], row["num_slots"], row["free_slots"], row["has_gpus"])
            for key, row in agents.items()
            if agent_key(row["host"], row["address"]) not in asked.without
        ]
        found = []
        for allocation in place(asked.num_ranks, slots, at_least=asked.at_least):
            home = await self.bridge_to(agents[allocation.address])
            found.append({"address": home, "home": home, "host": allocation.host, "num_ranks": allocation.num_ranks})
        return Placement(agents=found)

    async def _another(self, agents: dict[str, dict[str, Any]]) -> StandbyFound:
        others = [row for row in agents.values() if row["name"] != self.info["name"] and not row["is_leaving"]]
        if not others:
            return StandbyFound(address="")
        best = max(others, key=lambda row: (row["host"] != self.info["host"], row["is_warm"], row["free_slots"]))
        return StandbyFound(address=await self.bridge_to(best))

    async def end(self) -> None:
        """End the agent, and wait until it has."""
        pid, started = self.info["pid"], self.info["started"]
        if self._watching is not None:
            self._watching.cancel()  # it has not been killed
        try:
            async with await AgentConnection.open(self.info["address"], 2) as connection:
                await connection.request(Shutdown(), 5)
        except ConnectionLost:
            if is_process(pid, started):
                os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                while is_process(pid, started):
                    await asyncio.sleep(0.02)

    async def teardown(self, worker: Worker) -> None:
        """The worker ends, the agent stays for its lease: the next worker of that name adopts it."""
        if self._bridges is not None:
            self._bridges.close()
        await self._let_go()


async def register(client: Client, plugin: AgentPlugin) -> None:
    """Have an agent beside every worker of a cluster, and of those to come.

    Raises WorldError where a worker cannot have one; nothing is left in its scheduler then, by which workers that come
    later would end.
    """
    try:
        await client.register_plugin(plugin)
    except Exception as error:
        with contextlib.suppress(Exception):
            await client.unregister_worker_plugin(PLUGIN_NAME)
        if isinstance(error, LLMCloudError):
            raise
        version = importlib.metadata.version("jupyter-llmcloud")
        raise WorldError(
            f"a worker of this cluster cannot start a node agent ({type(error).__name__}: {error}). Workers need "
            f"jupyter-llmcloud in the version of this server, and torch, in their own environment: pip install "
            f"jupyter-llmcloud=={version}. Start them again then; their own output tells more."
        ) from None


async def open_bridges(infos: Sequence[dict[str, Any]], always: bool, dask_worker: Worker) -> list[str]:
    """Run on a worker: sockets there that stand for the agents beside other workers; returns their paths."""
    plugin = _plugin(dask_worker)
    return [await plugin.bridge_to(info, always) for info in infos]  # each is local: nobody else is asked


async def agent_info(dask_worker: Worker) -> dict[str, Any]:
    """Run on a worker: what its agent said of itself; one that was killed is replaced first."""
    return await _plugin(dask_worker).hold(dask_worker)


async def is_agent_busy(dask_worker: Worker) -> bool:
    """Run on a worker: whether its agent executes runs."""
    return bool((await _plugin(dask_worker).describe(dask_worker))["num_runs"])


async def agent_load(dask_worker: Worker) -> dict[str, Any]:
    """Run on a worker: what its agent holds and wants, as core.scheduling.elasticity.WorkerLoad."""
    row = await _plugin(dask_worker).describe(dask_worker)
    holds = bool(row["held"] or row["worlds"] or row["num_runs"] or row["num_replicas"])
    return {"num_slots": row["num_slots"], "free_slots": row["free_slots"], "holds": holds, "wants": row["wants"]}


async def end_agent(dask_worker: Worker) -> None:
    """Run on a worker: end its agent with all that runs there; returns when it has ended."""
    await _plugin(dask_worker).end()


async def ask_agents(client: Client) -> dict[str, Any]:
    """What each worker says of its agent, or the error by which it said nothing, by the worker's address.

    Asked again after a while: the scheduler tries for a minute to reach a worker of whose end it has not heard yet.
    """
    asked: set[asyncio.Task[dict[str, Any]]] = set()
    patience_s = ASK_AGAIN_S
    try:
        while True:
            asked.add(asyncio.create_task(client.run(agent_info, on_error="return")))
            done, _ = await asyncio.wait(asked, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            patience_s *= 2
            if done:
                return done.pop().result()
    finally:
        for task in asked:
            task.cancel()


async def agents_there(client: Client) -> dict[str, dict[str, Any] | None]:
    """What each worker says of its agent, by the worker's address; None of one that did not answer: perhaps it goes.

    Raises what a worker has failed with.
    """
    rows: dict[str, dict[str, Any] | None] = {}
    for worker, row in (await ask_agents(client)).items():
        if isinstance(row, Exception) and not isinstance(row, OSError | ConnectionLost):
            raise row
        rows[worker] = row if isinstance(row, dict) else None
    return rows


async def _all_agents(worker: Worker, at_once: bool = False) -> dict[str, dict[str, Any]]:
    """What the agents of a worker's cluster, its own among them, say of themselves; by the addresses of workers."""
    known = (await worker.scheduler.identity())["workers"]
    rows = await asyncio.gather(*(_ask_worker(worker, address, at_once) for address in known))
    return {row["worker"]: row for row in rows if row is not None}


async def _ask_worker(worker: Worker, address: str, at_once: bool) -> dict[str, Any] | None:
    """What an agent says of itself now; None when it or its worker does not answer."""
    try:
        async with asyncio.timeout(DESCRIBE_TIMEOUT_S + 1):
            message = {"op": DESCRIBE, "at_once": True} if at_once else {"op": DESCRIBE}
            asked = worker.scheduler.broadcast(msg=message, workers=[address], on_error="ignore")
            row = (await asked).get(address)
    except (OSError, TimeoutError):
        return None
    return row if isinstance(row, dict) and "free_slots" in row else None


def _interface(worker: Worker) -> str:
    """The address of this host by which others reach the worker; a name is resolved, since gloo wants an interface."""
    host = urlparse(worker.address).hostname or "127.0.0.1"
    with contextlib.suppress(OSError):
        found = {family: str(address[0]) for family, *_, address in socket.getaddrinfo(host, None)}
        return found.get(socket.AF_INET) or found[socket.AF_INET6]
    return host


def _plugin(worker: Worker) -> AgentPlugin:
    plugin = worker.plugins[PLUGIN_NAME]
    assert isinstance(plugin, AgentPlugin)
    return plugin
