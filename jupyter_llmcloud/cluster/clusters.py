"""The clusters of a server: starts and adopts their host processes, is a Dask client of each, places ranks on them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from distributed import Client

from jupyter_llmcloud.cluster.agent_info import AgentInfo, AgentView
from jupyter_llmcloud.cluster.dask_client import check_scheduler, install, open_client, open_known_client
from jupyter_llmcloud.cluster.factory import known_kinds, starts_here
from jupyter_llmcloud.cluster.host import tls_of
from jupyter_llmcloud.cluster.host_launcher import HostProcesses
from jupyter_llmcloud.cluster.kinds.gateway import is_behind_gateway
from jupyter_llmcloud.cluster.placement_queue import NoSlots, PlacementQueues
from jupyter_llmcloud.cluster.record import ClusterRecord, saved_records
from jupyter_llmcloud.cluster.tunnel.agent_sockets import AgentSockets
from jupyter_llmcloud.cluster.tunnel.relay import RelayPlugin
from jupyter_llmcloud.cluster.worker_plugin import PLUGIN_NAME, ask_agents, open_bridges
from jupyter_llmcloud.core.names import check_name
from jupyter_llmcloud.core.options import did_you_mean
from jupyter_llmcloud.core.scheduling.holders import HeldWorld, find_world
from jupyter_llmcloud.core.scheduling.priorities import Shortage
from jupyter_llmcloud.core.scheduling.replica_room import REPLICA, ReplicaNeeds, place_replica
from jupyter_llmcloud.errors import (
    Busy,
    ConnectionLost,
    LLMCloudError,
    NameTaken,
    NotFound,
    ProtocolError,
    UsageError,
    WorldError,
)
from jupyter_llmcloud.protocol.agent_messages import (
    AdoptCluster,
    Describe,
    DescribeResources,
    DumpStacks,
    ListVariables,
    ScaleCluster,
    Shutdown,
    StopWorld,
    WorldStacks,
    WorldVariables,
)
from jupyter_llmcloud.protocol.client import AgentConnection

ASK_TIMEOUT_S = 30.0
START_CHECK_S = 0.2  # between two looks at a cluster that is being started
DESCRIBE_TIMEOUT_S = 15.0
CLOSE_TIMEOUT_S = 1.0


class ClusterPool:
    """Asyncio; lives in the loop of the Jupyter server.

    Args:
        owner_pid: the process to which started clusters belong.
        lease_s: how long a cluster stays when that process has gone and nothing runs.
        always_tunnel: reach agents through Dask also where their sockets are on this host.
        begun_cluster_id: a local cluster whose agents were started ahead of the server.

    Attributes:
        on_shortage: told, as often as it asks, of a world that waits for slots.
    """

    def __init__(
        self, owner_pid: int, lease_s: float, *, always_tunnel: bool = False, begun_cluster_id: str = ""
    ) -> None:
        self._begun_cluster_id = begun_cluster_id
        self.owner_pid = owner_pid
        self.lease_s = lease_s
        self._records: dict[str, ClusterRecord] = {}
        self._reach = AgentSockets(lambda name: self._records[name], always_tunnel)
        self._clients: dict[str, Client] = {}
        self._hosts = HostProcesses(lease_s)
        self._queues = PlacementQueues()
        self.on_shortage: Callable[[Shortage], None] = lambda _: None
        self._default_start = asyncio.Lock()
        self._reviving = asyncio.Lock()

    # --- start and adopt ---

    async def restore(self) -> None:
        """Adopt the clusters that outlived an earlier server of this user."""
        for record in saved_records():
            if record.has_owner or record.name in self._records:
                continue  # of another server that lives
            if not record.is_alive and not record.has_agents:
                record.forget()
            elif record.state == "running":
                self._records[record.name] = record
                if record.is_alive and record.pid:
                    with contextlib.suppress(ConnectionLost):
                        adopt = AdoptCluster(owner_pid=self.owner_pid, owner_started=self._started())
                        await self._hosts.ask(record, adopt)
                await self._reach.restore(record)

    def _started(self) -> float:
        return psutil.Process(self.owner_pid).create_time()

    async def start(
        self,
        kind: str = "local",
        name: str | None = None,
        workers: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> ClusterRecord:
        """Start a cluster of `kind` and wait until it runs. Raises UsageError, NameTaken, WorldError."""
        if ":" not in kind and kind not in known_kinds() and kind != "labextension":
            raise UsageError(
                f"{kind!r} is no kind of cluster. Choose one of {', '.join(known_kinds())}, or module:Class."
                f"{did_you_mean(kind, known_kinds())}"
            )
        if workers is not None and workers < 1:
            raise UsageError(f"--workers {workers}: a cluster is started with at least one worker.")
        name = check_name(name, "the cluster's name") if name else self._free_name(kind)
        self._check_free(name)
        cluster_id = ""
        if starts_here(kind, options or {}):
            cluster_id, self._begun_cluster_id = self._begun_cluster_id, ""
        record = ClusterRecord(
            cluster_id=cluster_id or secrets.token_hex(4),
            name=name,
            kind=kind,
            created=time.time(),
            owner_pid=self.owner_pid,
            owner_started=self._started(),
            workers=workers,
            options=options or {},
        )
        record.save()
        self._records[name] = record
        try:
            self._records[name] = await self._hosts.start(record)
        except BaseException:
            self._records.pop(name, None)
            self._hosts.abandon(record)
            record.forget()
            raise
        return await self._fresh(self._records[name])

    def _check_free(self, name: str) -> None:
        if name in self._records and self._records[name].is_alive:
            raise NameTaken(
                f"there is a cluster {name!r} already. Choose another --name, or stop it: %cluster stop {name}."
            )

    def _free_name(self, kind: str) -> str:
        base = kind.rsplit(":", 1)[-1].lower()
        taken = {name for name, record in self._records.items() if record.is_alive}
        return next(name for name in [base, *(f"{base}-{i}" for i in range(2, 10_000))] if name not in taken)

    async def connect(self, address: str, name: str | None = None, num_slots: int | None = None) -> ClusterRecord:
        """Use a cluster that somebody else has started. TLS as Dask's configuration says."""
        name = check_name(name, "the cluster's name") if name else self._free_name("connected")
        self._check_free(name)
        record = ClusterRecord(
            cluster_id=secrets.token_hex(4),
            name=name,
            kind="connected",
            address=address,
            state="running",
            created=time.time(),
            options={"slots": num_slots},
        )
        try:
            client = await open_client(address)
        except (OSError, TimeoutError, ValueError, RuntimeError) as error:
            raise ConnectionLost(f"no Dask scheduler answers at {address!r}: {error}.") from None
        try:
            await install(client, record)
        except BaseException:
            with contextlib.suppress(Exception):
                await client.close()
            raise
        if is_behind_gateway(address) and client.scheduler is not None:
            record.address = str(client.scheduler.address)  # as the gateway has told it
        record.dashboard = client.dashboard_link or ""
        record.tls = tls_of(client.security)
        record.save()
        self._records[name], self._clients[name] = record, client
        return await self._fresh(record)

    # --- look ---

    async def _fresh(self, record: ClusterRecord) -> ClusterRecord:
        if record.state == "running":
            agents = await self.agents(record.name)
            record = self._records[record.name]  # another one, when the cluster was revived on the way
            record.num_workers, record.num_slots = len(agents), sum(agent.num_slots for agent in agents)
        return record

    async def _revived(self, record: ClusterRecord) -> ClusterRecord:
        """The cluster with a living host process: when that (and so the scheduler) was killed, another takes its place.

        Its node agents and what runs on them live on meanwhile; the new workers adopt them.
        """
        async with self._reviving:
            record = self._records[record.name]
            if record.is_alive or record.state != "running":
                return record
            await self._close_client(record.name)
            record.owner_pid, record.owner_started, record.state = self.owner_pid, self._started(), "starting"
            record.save()
            self._records[record.name] = await self._hosts.start(record)
            return self._records[record.name]

    def _record(self, name: str | None) -> ClusterRecord:
        """The named cluster, or the newest one: of those that run, if any does."""
        alive = [record for record in self._records.values() if record.is_alive or record.has_agents]
        if name is None and (staying := [record for record in alive if record.state != "stopping"]):
            return max(staying, key=lambda record: (bool(record.address), record.created))
        for record in alive:
            if record.name == name:
                return record
        known = (
            f" There are: {', '.join(record.name for record in alive)}." if alive else " Start one with %cluster start."
        )
        raise NotFound((f"there is no cluster {name!r}." if name else "there is no cluster.") + known)

    async def _started_record(self, name: str | None) -> ClusterRecord:
        """The same once it has a scheduler. One whose start fails is none."""
        while not (record := self._record(name)).address:
            await asyncio.sleep(START_CHECK_S)
        return await self._revived(record)

    def _has_any(self) -> bool:
        staying = (record for record in self._records.values() if record.state != "stopping")
        return any(record.is_alive or record.has_agents for record in staying)

    async def _client(self, record: ClusterRecord) -> Client:
        client = self._clients.get(record.name)
        if client is None or client.status != "running":
            client = self._clients[record.name] = await open_known_client(record)
        return client

    async def agents(self, name: str | None = None) -> list[AgentInfo]:
        """The node agents of a cluster as they are now."""
        record, rows = await self._ask_workers(name)
        infos = [info for info in rows.values() if not isinstance(info, BaseException)]  # others end or start
        found = await asyncio.gather(*(self._ask_agent(record, info) for info in infos), return_exceptions=True)
        silent = [agent for agent in found if isinstance(agent, ConnectionLost | NotFound)]
        for agent in found:
            if isinstance(agent, BaseException) and (agent not in silent or len(silent) == len(found)):
                raise agent
        return [agent for agent in found if isinstance(agent, AgentInfo)]

    async def _ask_agent(self, record: ClusterRecord, info: dict[str, Any]) -> AgentInfo:
        address = await self._reach.to(record, info, info["address"])
        async with await AgentConnection.open(address) as connection:
            values = await connection.request(Describe(), DESCRIBE_TIMEOUT_S)
        known = {**values.as_dict(), "address": address, "worker": info["worker"], "home": info["address"]}
        return AgentInfo(**{key: known[key] for key in AgentInfo.__dataclass_fields__})

    async def look(self, name: str | None = None) -> list[AgentView]:
        """Every worker of a cluster with its node agent, what that holds, and what its processes take."""
        record, rows = await self._ask_workers(name)
        found = await asyncio.gather(*(self._look_at(record, worker, row) for worker, row in rows.items()))
        return list(found)

    async def _look_at(self, record: ClusterRecord, worker: str, row: Any) -> AgentView:
        if isinstance(row, BaseException):
            return AgentView(worker, "its node agent has not started yet, or has ended")
        try:
            address = await self._reach.to(record, row, row["address"])
            async with await AgentConnection.open(address) as connection:
                described = await connection.request(Describe(), DESCRIBE_TIMEOUT_S)
                resources = None
                with contextlib.suppress(ProtocolError, UsageError):  # of an earlier version
                    resources = await connection.request(DescribeResources(), DESCRIBE_TIMEOUT_S)
        except (LLMCloudError, TimeoutError) as error:
            return AgentView(worker, f"its node agent does not answer: {error}".rstrip("."), host=row.get("host", ""))
        return AgentView(worker, "", described.host, described, resources)

    async def _ask_workers(self, name: str | None) -> tuple[ClusterRecord, dict[str, Any]]:
        """What each worker's plugin says of its agent; goes on when the scheduler is killed meanwhile."""
        deadline = time.monotonic() + ASK_TIMEOUT_S
        while True:
            record = await self._started_record(name)
            try:
                client = await self._client(record)
                rows = await ask_agents(client)
                if not record.pid and any(isinstance(row, KeyError) for row in rows.values()):
                    await install(client, record)  # its scheduler was started again and knows nothing of us
                    rows = await ask_agents(client)
                return record, rows
            except OSError as error:
                if time.monotonic() > deadline:
                    silent = f"the scheduler of cluster {record.name!r} does not answer"
                    raise ConnectionLost(f"{silent}: {error}.") from None
                await self._close_client(record.name)
                await asyncio.sleep(0.1)

    async def reach_replica(self, cluster: str | None, agent: AgentInfo, path: str) -> str:
        """A socket on this host for a replica's socket beside an agent: itself, where the agent is reached directly.

        Whether it is there already says nothing: a replica that was just started has not bound it yet.
        """
        if agent.address == agent.home:
            return path
        info = {"host": agent.host, "worker": agent.worker, "name": agent.name}
        return await self._reach.to(self._record(cluster), info, path)

    def log(self, name: str) -> tuple[ClusterRecord, Path]:
        """The record of a cluster, also of one that is starting, and where its host process prints to."""
        record = self._record(name)
        return record, record.folder / "host.log"

    async def _check_reached(self, record: ClusterRecord) -> None:
        """Raise ConnectionLost at once for a connected cluster that has gone; Dask's client tries for half a minute."""
        if not record.pid and record.name not in self._clients and not is_behind_gateway(record.address):
            await check_scheduler(record.address)

    # --- use ---

    async def place(
        self,
        cluster: str | None,
        num_ranks: int | None,
        ticket: str = "",
        replaces: str = "",
        priority: int = 0,
    ) -> dict[str, Any]:
        """Where `num_ranks` ranks go (a `ticket` keeps one's turn); with no cluster a local one is started.

        The slots of the world `replaces` count as free: whoever asks ends it next, and comes back with the ticket.
        """
        async with self._default_start:
            if started := (cluster is None and not self._has_any()):
                await self.start()
        record = self._record(cluster)
        if not replaces:
            self._queues.come(record.cluster_id, ticket, priority)
        agents = await self.agents(record.name)
        try:
            placed = self._queues.place(record.cluster_id, ticket, num_ranks, agents, replaces, priority)
        except NoSlots as lack:
            held = {holder.removeprefix(REPLICA): number for agent in agents for holder, number in agent.held.items()}
            self.on_shortage(Shortage(record.name, lack.missing, priority, held))
            raise
        allocations, world_id = placed
        return {
            "cluster": record.name,
            "world_id": world_id,
            "agents": await self._for_leader(record, agents, [asdict(allocation) for allocation in allocations]),
            "num_ranks": sum(allocation.num_ranks for allocation in allocations),
            "started": started,
        }

    async def _for_leader(
        self, record: ClusterRecord, agents: Sequence[AgentInfo], allocations: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Allocations with `home` added: how the first agent, the leader, reaches each of them from its own host."""
        by_address = {agent.address: agent for agent in agents}
        leader = by_address[allocations[0]["address"]]
        others = [allocation for allocation in allocations if by_address[allocation["address"]] is not leader]
        infos = [
            {"host": agent.host, "worker": agent.worker, "name": agent.name, "address": agent.home}
            for agent in (by_address[allocation["address"]] for allocation in others)
        ]
        homes: list[str] = []
        if infos:
            asked = (await self._client(record)).run(
                open_bridges, infos, self._reach.always_tunnel, workers=[leader.worker]
            )
            homes = (await asked)[leader.worker]
        for allocation in allocations:
            allocation["home"] = leader.home
        for allocation, home in zip(others, homes, strict=True):
            allocation["home"] = home
        return allocations

    async def worlds(self, cluster: str | None = None) -> list[tuple[str, HeldWorld]]:
        """Every world with the name of its cluster; of all clusters when none is named."""
        names = [cluster] if cluster is not None else await self._names_running()
        return [(name, world) for name in names for world, _ in await self._worlds_with_leaders(name)]

    async def _worlds_with_leaders(self, cluster: str) -> list[tuple[HeldWorld, AgentInfo]]:
        agents = await self.agents(cluster)
        return [(HeldWorld.read(world), agent) for agent in agents for world in agent.worlds]

    async def _names_running(self) -> list[str]:
        """Of the clusters that can be asked: one that starts has no address yet, one that failed does not answer."""
        return [record.name for record in await self.list() if record.address and record.state == "running"]

    async def stop_world(self, name: str) -> HeldWorld:
        """End a world, whoever has it, with its variables and what is executed there. Raises NotFound, UsageError."""
        ended, leader = await self._find_world(name)
        async with await AgentConnection.open(leader.address) as connection:
            await connection.request(StopWorld(world_id=ended.world_id))
        return ended

    async def world_stacks(self, name: str) -> tuple[str, WorldStacks]:
        """The id of a world, and what every thread of its ranks is doing. Raises NotFound, UsageError."""
        world, leader = await self._find_world(name)
        async with await AgentConnection.open(leader.address) as connection:
            return world.world_id, await connection.request(DumpStacks(world_id=world.world_id), ASK_TIMEOUT_S)

    async def world_variables(self, name: str) -> tuple[str, WorldVariables]:
        """The id of a world, and the user's variables on its ranks. Raises NotFound, UsageError."""
        world, leader = await self._find_world(name)
        async with await AgentConnection.open(leader.address) as connection:
            return world.world_id, await connection.request(ListVariables(world_id=world.world_id), ASK_TIMEOUT_S)

    async def _find_world(self, name: str) -> tuple[HeldWorld, AgentInfo]:
        found = [pair for cluster in await self._names_running() for pair in await self._worlds_with_leaders(cluster)]
        wanted = find_world([world for world, _ in found], name)
        return wanted, next(agent for world, agent in found if world is wanted)

    async def agent_for_replica(
        self,
        cluster: str | None,
        needs: ReplicaNeeds = ReplicaNeeds(),  # noqa: B008 - a value
        ticket: str = "",
        priority: int = 0,
    ) -> tuple[str, AgentInfo]:
        """An agent with room for a replica; of the newest cluster, started if need be, when none is named.

        Raises CapacityError, or Busy when there is no room now; a `ticket` keeps its turn then.
        """
        async with self._default_start:
            if cluster is None and not self._has_any():
                await self.start()
        record = self._record(cluster)
        agents = await self.agents(record.name)
        if not agents:
            raise WorldError(f"the cluster {record.name!r} has no workers: %cluster scale 1.")
        num_slots = needs.slots(any(agent.has_gpus for agent in agents))
        if ticket and num_slots:
            self._queues.admit_replica(record.cluster_id, ticket, num_slots, agents, priority)
        try:
            address = place_replica(needs, [agent.room() for agent in agents])
        except Busy:
            if sum(agent.free_slots for agent in agents) >= num_slots:  # nobody shall wait for one that lacks memory
                self._queues.leave(record.cluster_id, ticket)
            raise
        return record.name, next(agent for agent in agents if agent.address == address)

    async def client_for_data(self, cluster: str | None) -> tuple[str, Client]:
        """The name of a cluster and its Dask client; of the newest one, started if need be, when none is named."""
        async with self._default_start:
            if cluster is None and not self._has_any():
                await self.start()
        record = await self._started_record(cluster)
        return record.name, await self._client(record)

    async def scale(self, name: str | None, workers: int) -> ClusterRecord:
        """Have `workers` workers."""
        record = self._record(name)
        if workers < 0:
            raise UsageError(f"%cluster scale {workers}: expected 0 or more workers.")
        self._check_ours(record, "scaled")
        record = await self._revived(record)
        await self._hosts.ask(record, ScaleCluster(workers=workers), 180)
        return await self._fresh(record)

    async def adapt(self, name: str | None, minimum: int, maximum: int) -> ClusterRecord:
        """Have between `minimum` and `maximum` workers, as the load asks."""
        record = self._record(name)
        if not 0 <= minimum <= maximum or maximum < 1:
            raise UsageError(f"%cluster adapt {minimum} {maximum}: expected 0 <= MIN <= MAX and MAX >= 1.")
        self._check_ours(record, "scaled")
        record = await self._revived(record)
        await self._hosts.ask(record, ScaleCluster(minimum=minimum, maximum=maximum), 60)
        return await self._fresh(record)

    @staticmethod
    def _check_ours(record: ClusterRecord, verb: str) -> None:
        if not record.pid:
            raise UsageError(f"the cluster {record.name!r} was only connected to: it is {verb} by whoever started it.")

    # --- end ---

    async def stop(self, name: str | None) -> str:
        """End a cluster and all that runs on it; leave one that was only connected to. Returns its name."""
        record = self._record(name)
        was, record.state = record.state, "stopping"  # whoever looks meanwhile does not take it for one that was killed
        try:
            if record.pid:
                await self._close_client(record.name)
                await self._hosts.stop(record)
            else:
                await self._leave(record)
        except BaseException:
            record.state = was
            raise
        await self._drop(record)
        return record.name

    async def _leave(self, record: ClusterRecord) -> None:
        """End our agents there. A scheduler that has gone has taken its workers along: then there is nothing to end."""
        try:
            await self._check_reached(record)
            agents = await self.agents(record.name)
        except ConnectionLost:
            return
        for agent in agents:
            with contextlib.suppress(ConnectionLost):
                async with await AgentConnection.open(agent.address) as connection:
                    await connection.request(Shutdown())
        client = await self._client(record)
        await client.unregister_worker_plugin(PLUGIN_NAME)
        with contextlib.suppress(Exception):  # it may have had none
            await client.unregister_scheduler_plugin(RelayPlugin.name)

    async def _drop(self, record: ClusterRecord) -> None:
        if self._records.get(record.name) is not record:
            return  # somebody else has; another cluster may have its name by now
        del self._records[record.name]
        await self._close_client(record.name)
        self._reach.forget(record.name)
        self._hosts.forget(record)
        record.forget()

    async def _close_client(self, name: str) -> None:
        if client := self._clients.pop(name, None):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), CLOSE_TIMEOUT_S)

    async def release(self) -> None:
        """Let go of the clusters without ending them: another server may adopt them within their lease."""
        self._reach.release()
        for name in list(self._clients):
            await self._close_client(name)

    async def close(self) -> None:
        """End every cluster."""
        for name in list(self._records):
            with contextlib.suppress(NotFound):
                await self.stop(name)

    async def list(self) -> list[ClusterRecord]:
        """Every living cluster; one whose scheduler does not answer is `failed`, with the reason."""
        for record in list(self._records.values()):
            if not record.is_alive and not record.has_agents:
                await self._drop(record)
        return list(await asyncio.gather(*(self._listed(record) for record in list(self._records.values()))))

    async def _listed(self, record: ClusterRecord) -> ClusterRecord:
        try:
            await self._check_reached(record)
            return await self._fresh(await self._revived(record))
        except ConnectionLost as error:
            way_out = f"If it has ended, %cluster stop {record.name} forgets it." if not record.pid else ""
            reason = f"{error} {way_out}".rstrip()
            return replace(record, state="failed", reason=reason, num_workers=0, num_slots=0)
