"""The node agent: listens on a unix socket, owns worlds and replicas, ends with its lease."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import psutil

from jupyter_llmcloud.agent.failover.leader_link import Followings
from jupyter_llmcloud.agent.failover.standby import Takeovers
from jupyter_llmcloud.agent.failover.worker_client import ClusterRoom
from jupyter_llmcloud.agent.ranks.devices import Devices
from jupyter_llmcloud.agent.ranks.local_group import HostedRanks
from jupyter_llmcloud.agent.ranks.remote_group import RemoteRanks
from jupyter_llmcloud.agent.ranks.zygote_client import ZygoteClient
from jupyter_llmcloud.agent.replicas import Replicas
from jupyter_llmcloud.agent.world.store import Store
from jupyter_llmcloud.agent.world.world import World
from jupyter_llmcloud.errors import LLMCloudError, NameTaken, NotFound, UsageError
from jupyter_llmcloud.protocol.agent_messages import (
    AgentDescription,
    Describe,
    DescribeReplicas,
    DescribeWorld,
    DumpStacks,
    Execute,
    Names,
    Pull,
    Push,
    RenewLease,
    ReplicaDescription,
    ReplicaList,
    ResizeWorld,
    Shutdown,
    StartReplica,
    StartWorld,
    StopReplica,
    StopRun,
    StopWorld,
    Submitted,
    Subscribe,
    WorldDescription,
)
from jupyter_llmcloud.protocol.connection import AGENT_SOCKET, Connection
from jupyter_llmcloud.protocol.frames import Unreadable
from jupyter_llmcloud.protocol.rank_messages import Follow, Said
from jupyter_llmcloud.protocol.rpc import Request, Responder, refusal
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from jupyter_llmcloud.system import unix_sockets
from jupyter_llmcloud.system.atomic_files import write_json

LEASE_CHECK_S = 1.0


class Agent:
    """One per Dask worker.

    Args:
        folder: where its socket, logs and `agent.json` live (0700).
        name: of the worker.
        interface: address on which ranks of other hosts reach this one.
        lease_s: seconds it lives when no worker holds a connection and nothing runs.
        first_lease_s: seconds it waits for its first worker at least.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        interface: str,
        num_slots: int | None,
        lease_s: float,
        first_lease_s: float = 0.0,
    ) -> None:
        self.folder = folder
        self.name = name
        self.interface = interface
        self.lease_s = lease_s
        self.address = str(folder / AGENT_SOCKET)
        self.devices = Devices(num_slots, interface)
        self.zygote = ZygoteClient(folder / "zygote.log", self._on_exit)
        self.replicas = Replicas(folder, self.devices)
        self.worlds: dict[str, World] = {}
        self.begun: deque[str] = deque(maxlen=100)  # worlds that were started, the newest last
        self.hosted: dict[str, HostedRanks] = {}
        self._stores: dict[str, Store] = {}
        self._num_stores = 0
        self.followings = Followings(self)
        self.cluster = ClusterRoom(self)
        self.takeovers = Takeovers(self)
        self._held_until = time.monotonic() + max(lease_s, first_lease_s)
        self._finished = asyncio.Event()
        self._was_signalled = False
        self._responder = self._make_responder()
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- life ---

    async def serve(self) -> None:
        """Listen until shut down or until the lease has ended."""
        server = await unix_sockets.listen(self.address, self._connected, limit=1 << 20)
        self._announce()
        self.zygote.warm()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_signal)
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        watch = asyncio.create_task(self._watch_leases())
        await self._finished.wait()
        watch.cancel()
        server.close()
        await self._close()

    def _on_signal(self) -> None:
        self._was_signalled = True
        self._finished.set()

    def _announce(self) -> None:
        me = psutil.Process()
        about = {"pid": me.pid, "started": me.create_time(), **self.describe().as_dict()}
        write_json(self.folder / "agent.json", about, durable=False)  # of a process, which no loss of power outlives

    async def _close(self) -> None:
        self.takeovers.close()
        for world in self.worlds.values():
            if self._was_signalled:
                world.leave()
            else:
                world.close()
        for hosted in self.hosted.values():
            hosted.close()
        await self.replicas.close()
        self.zygote.close()
        for name in ("agent.json", "agent.sock"):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    async def _watch_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_CHECK_S)
            now = time.monotonic()
            for world in list(self.worlds.values()):
                if (
                    world.runs.active is None
                    and not world.runs.queued
                    and not world.owners
                    and now - world.idle_since > world.lease_s
                ):
                    self.end_world(world.world_id)
                else:
                    world.beat()
            self.followings.beat()
            if self.cluster.is_there or self.worlds or self.hosted:  # a world has a lease of its own, on its leader
                self._held_until = now + self.lease_s
            elif now > self._held_until:
                self._finished.set()

    def describe(self) -> AgentDescription:
        """What it is, and what it holds now."""
        return AgentDescription(
            name=self.name,
            pid=os.getpid(),
            host=socket.gethostname(),
            address=self.address,
            num_slots=len(self.devices.slots),
            free_slots=len(self.devices.free),
            has_gpus=self.devices.has_gpus,
            worlds=[
                {"world_id": world.world_id, "owner": world.owner, "world_size": world.world_size}
                for world in self.worlds.values()
            ],
            begun=list(self.begun),
            num_replicas=self.replicas.num_running,
            num_runs=self.takeovers.num_waiting + sum(w.runs.active is not None for w in self.worlds.values()),
            stands_by=self.followings.stands_by,
        )

    # --- what worlds need ---

    async def start_store(self, world_id: str, shares: Sequence[dict[str, Any]]) -> str:
        """The TCPStore of a world; on loopback unless ranks on other hosts must reach it."""
        self._num_stores += 1
        store = Store(f"{world_id}/store{self._num_stores}", self.folder / "store.log")
        self._stores[world_id] = store
        return await store.start(self.zygote, self.interface if self.is_elsewhere(shares) else "127.0.0.1")

    @staticmethod
    def is_elsewhere(shares: Sequence[dict[str, Any]]) -> bool:
        """Whether some of these ranks are on another host."""
        return any(share.get("host") not in (None, socket.gethostname()) for share in shares)

    def end_store(self, world_id: str) -> None:
        """The world needs it no more."""
        if store := self._stores.pop(world_id, None):
            store.close()

    def host_ranks(self, **spec: Any) -> HostedRanks:
        """Ranks of a world on this agent."""
        hosted = HostedRanks(self.zygote, self.devices, **spec)
        self.hosted[spec["world_id"]] = hosted
        return hosted

    def reach_ranks(self, address: str, lease_s: float) -> Callable[..., RemoteRanks]:
        """Ranks of a world on the agent at `address`, which live for `lease_s` when this agent is not heard there."""
        return lambda **spec: RemoteRanks(address, **spec, lease_s=lease_s)

    def _on_exit(self, name: str, status: int) -> None:
        world_id, _, part = name.rpartition("/")
        if part.startswith("store") and (store := self._stores.get(world_id)) is not None and store.name == name:
            self.worlds[world_id].shares.has_store = False
        for key, hosted in list(self.hosted.items()):
            if hosted.exited(name, status):
                if hosted.is_over:
                    del self.hosted[key]
                return

    def end_world(self, world_id: str) -> None:
        """End every rank of a world. Raises NotFound."""
        world = self.worlds.pop(world_id, None)
        if world is not None:
            world.close()
        else:
            raise NotFound(f"there is no world {world_id!r} on this worker.")

    def _world(self, world_id: str) -> World:
        if world_id not in self.worlds:
            raise NotFound(
                "the world has ended: its lease ran out or somebody stopped it. The next cell starts a new one."
            )
        return self.worlds[world_id]

    # --- connections ---

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer, "whoever asks this node agent")
        try:
            async for message in connection.messages():
                if isinstance(message, Said):
                    self.followings.hear(message, connection)
                elif isinstance(message, Request | Unreadable):
                    self._do(self._responder.serve(message, connection.send, connection))
        except LLMCloudError as error:  # what came is no message of this version
            connection.send(refusal(error))
        except asyncio.CancelledError:
            pass  # the agent ends
        finally:
            self._forget(connection)
            connection.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _forget(self, connection: Connection) -> None:
        self.cluster.forget(connection)
        for world in self.worlds.values():
            if connection in world.owners:
                world.owners.discard(connection)
                world.idle_since = time.monotonic()
            if world.runs.active is not None:
                world.runs.active.followers.discard(connection)
        self.followings.forget(connection)

    # --- requests ---

    def _make_responder(self) -> Responder:
        """What this agent answers; every handler is given the connection besides."""
        responder = Responder("the node agent")
        responder.on(Execute, self._execute)
        responder.on(Push, self._push)
        responder.on(Pull, lambda asked, _: self._world(asked.world_id).ask(asked.rank, asked))
        responder.on(Names, lambda asked, _: self._world(asked.world_id).ask(asked.rank, asked))
        responder.on(StopRun, self._stop_run)
        responder.on(Subscribe, self._subscribe)
        responder.on(StartWorld, self._start_world)
        responder.on(ResizeWorld, self._resize_world)
        responder.on(StopWorld, lambda asked, _: self.end_world(asked.world_id))
        responder.on(DescribeWorld, self._describe_world)
        responder.on(DumpStacks, lambda asked, _: self._world(asked.world_id).stacks())
        responder.on(Describe, lambda *_: self.describe())
        responder.on(Follow, self.followings.follow)
        responder.on(StartReplica, self._start_replica)
        responder.on(StopReplica, lambda asked, _: self.replicas.stop(asked.replica_id))
        responder.on(DescribeReplicas, lambda *_: ReplicaList(replicas=self.replicas.describe()))
        responder.on(RenewLease, self._renew_lease)
        responder.on(Shutdown, self._shut_down)
        return responder

    async def _start_world(self, spec: StartWorld, connection: Connection) -> WorldDescription:
        if spec.world_id in self.worlds:
            raise NameTaken(f"there is a world {spec.world_id!r} already.")
        world = World(self, spec)
        self.worlds[spec.world_id] = world
        world.owners.add(connection)
        try:
            await world.start()
        except BaseException:
            self.worlds.pop(spec.world_id, None)
            raise
        self.begun.append(spec.world_id)
        if connection.closed and world in self.worlds.values():
            self.end_world(spec.world_id)  # who asked for it has gone, and nobody else knows of it
        return world.describe()

    async def lead_on(
        self, spec: StartWorld, cell: Execute, definitions: list[Execute], record: RunRecord, term: int
    ) -> None:
        """See a run through whose leader has gone, in a world like the one that it had; nobody owns that yet."""
        world = World(self, spec)
        world.idle_since = time.monotonic()
        self.worlds[spec.world_id] = world
        await world.runs.lead_on(cell, definitions, record, term)

    async def _execute(self, cell: Execute, connection: Connection) -> Submitted | None:
        world = self._world(cell.world_id)
        if cell.precision in ("fp16", "fp8") and not self.devices.has_gpus:
            raise UsageError(f"--precision {cell.precision} needs GPUs, these ranks run on CPUs. Choose bf16 or no.")
        if cell.background:
            RunFolder(Path(cell.folder)).check_room()  # whoever waits for its end will look there only
            self._do(world.runs.execute(cell, None))
            return Submitted(run_id=cell.run_id)
        world.owners.add(connection)
        await world.runs.execute(cell, connection)
        return None

    async def _resize_world(self, asked: ResizeWorld, _: Connection) -> WorldDescription:
        world = self._world(asked.world_id)
        await world.resize(asked.num_ranks, asked.agents)
        return world.describe()

    def _describe_world(self, asked: DescribeWorld, connection: Connection) -> WorldDescription:
        world = self._world(asked.world_id)
        world.owners.add(connection)
        return self._with_memory(world.describe())

    async def _push(self, asked: Push, _: Connection) -> None:
        world = self._world(asked.world_id)
        for rank in asked.ranks or range(world.world_size):
            await world.ask(rank, asked)

    async def _start_replica(self, asked: StartReplica, _: Connection) -> ReplicaDescription:
        return ReplicaDescription(**await self.replicas.start(asked.endpoint, asked.replica_id, asked.spec))

    def _renew_lease(self, asked: RenewLease, worker: Connection) -> None:
        self.cluster.held_by(worker, asked.finds_room)
        self.takeovers.inherit()

    def _shut_down(self, *_: Any) -> None:
        asyncio.get_running_loop().call_later(0.05, self._finished.set)  # when the reply has left

    def _stop_run(self, asked: StopRun, _: Connection) -> None:
        for world in self.worlds.values():
            if asked.run_id in world.runs:
                world.runs.stop(asked.run_id)
                return
        raise NotFound(f"run {asked.run_id!r} has ended.")

    def _subscribe(self, asked: Subscribe, connection: Connection) -> None:
        for world in self.worlds.values():
            if world.runs.active is not None and world.runs.active.record.run_id == asked.run_id:
                world.runs.active.followers.add(connection)
                return
        raise NotFound(f"run {asked.run_id!r} has ended.")

    @staticmethod
    def _with_memory(description: WorldDescription) -> WorldDescription:
        for row in description.ranks:
            with contextlib.suppress(psutil.Error):
                row["rss"] = psutil.Process(row["pid"]).memory_info().rss
        return description
