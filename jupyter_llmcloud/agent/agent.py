"""The node agent: listens on a unix socket, owns worlds and replicas, ends with its lease."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
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
    Describe,
    DescribeReplicas,
    DescribeWorld,
    Done,
    Execute,
    Names,
    Pull,
    Push,
    Refused,
    RenewLease,
    ResizeWorld,
    Shutdown,
    StartReplica,
    StartWorld,
    StopReplica,
    StopRun,
    StopWorld,
    Subscribe,
)
from jupyter_llmcloud.protocol.connection import AGENT_SOCKET, Connection
from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rank_messages import DumpStacks, Follow, Said
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

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
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- life ---

    async def serve(self) -> None:
        """Listen until shut down or until the lease has ended."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.address)
        mask = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._connected, self.address, limit=1 << 20)
        finally:
            os.umask(mask)
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
        aside = self.folder / ".agent.json"
        me = psutil.Process()
        aside.write_text(json.dumps({"pid": me.pid, "started": me.create_time(), **self.describe()}))
        os.replace(aside, self.folder / "agent.json")

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

    def describe(self) -> dict[str, Any]:
        """Answer to Describe."""
        return {
            "name": self.name,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "address": self.address,
            "num_slots": len(self.devices.slots),
            "free_slots": len(self.devices.free),
            "has_gpus": self.devices.has_gpus,
            "worlds": [
                {"world_id": world.world_id, "owner": world.owner, "world_size": world.world_size}
                for world in self.worlds.values()
            ],
            "begun": list(self.begun),
            "num_replicas": self.replicas.num_running,
            "num_runs": self.takeovers.num_waiting + sum(w.runs.active is not None for w in self.worlds.values()),
            "stands_by": self.followings.stands_by,
        }

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
        connection = Connection(reader, writer)
        try:
            async for message in connection.messages():
                task = asyncio.create_task(self._serve(message, connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except ValueError as error:
            connection.send(Refused(reason=str(error)))
        except asyncio.CancelledError:
            pass  # the agent ends
        finally:
            self._forget(connection)
            connection.close()

    def _forget(self, connection: Connection) -> None:
        self.cluster.forget(connection)
        for world in self.worlds.values():
            if connection in world.owners:
                world.owners.discard(connection)
                world.idle_since = time.monotonic()
            if world.runs.active is not None:
                world.runs.active.followers.discard(connection)
        self.followings.forget(connection)

    async def _serve(self, message: Message, connection: Connection) -> None:
        try:
            answer = await self._handle(message, connection)
        except LLMCloudError as error:
            answer = Refused(error=type(error).__name__, reason=str(error))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            answer = Refused(
                reason=f"the node agent failed on {type(message).__name__}: {type(error).__name__}: {error}"
            )
        if answer is not None:
            connection.send(type(answer)(**{**answer.__dict__, "reply_to": message.reply_to}))

    async def _handle(self, message: Message, connection: Connection) -> Message | None:
        match message:
            case Execute():
                return await self._execute(message, connection)
            case Push() | Pull() | Names():
                return await self._ask_ranks(message)
            case StopRun():
                self._stop_run(message.run_id)
            case Subscribe():
                self._subscribe(message.run_id, connection)
            case StartWorld():
                return await self._start_world(message, connection)
            case ResizeWorld():
                world = self._world(message.world_id)
                await world.resize(message.num_ranks, message.agents)
                return Done(values=world.describe())
            case StopWorld():
                self.end_world(message.world_id)
            case DescribeWorld():
                world = self._world(message.world_id)
                world.owners.add(connection)
                return Done(values=self._with_memory(world.describe()))
            case Describe():
                return Done(values=self.describe())
            case Follow():
                return self.followings.follow(message, connection)
            case Said():
                self.followings.hear(message, connection)
                return None
            case Done() | Refused():
                self.cluster.hear(message)
                return None
            case DumpStacks():
                return Done(values=await self._world(message.world_id).stacks())
            case StartReplica():
                return Done(values=await self.replicas.start(message.endpoint, message.replica_id, message.spec))
            case StopReplica():
                await self.replicas.stop(message.replica_id)
            case DescribeReplicas():
                return Done(values={"replicas": self.replicas.describe()})
            case RenewLease():
                self.cluster.held_by(connection, message.finds_room)
                self.takeovers.inherit()
            case Shutdown():
                asyncio.get_running_loop().call_later(0.05, self._finished.set)
            case _:
                raise LLMCloudError(f"an agent does not answer {type(message).__name__}.")
        return Done()

    # --- requests ---

    async def _start_world(self, spec: StartWorld, connection: Connection) -> Message:
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
        return Done(values=world.describe())

    async def lead_on(
        self, spec: StartWorld, cell: Execute, definitions: list[Execute], record: RunRecord, term: int
    ) -> None:
        """See a run through whose leader has gone, in a world like the one that it had; nobody owns that yet."""
        world = World(self, spec)
        world.idle_since = time.monotonic()
        self.worlds[spec.world_id] = world
        await world.runs.lead_on(cell, definitions, record, term)

    async def _execute(self, cell: Execute, connection: Connection) -> Message | None:
        world = self._world(cell.world_id)
        if cell.precision in ("fp16", "fp8") and not self.devices.has_gpus:
            raise UsageError(f"--precision {cell.precision} needs GPUs, these ranks run on CPUs. Choose bf16 or no.")
        if cell.background:
            RunFolder(Path(cell.folder)).check_room()  # whoever waits for its end will look there only
            task = asyncio.create_task(world.runs.execute(cell, None))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return Done(values={"run_id": cell.run_id})
        world.owners.add(connection)
        await world.runs.execute(cell, connection)
        return None

    async def _ask_ranks(self, message: Push | Pull | Names) -> Message:
        world = self._world(message.world_id)
        if isinstance(message, Push):
            for rank in message.ranks or range(world.world_size):
                await world.ask(rank, message)
            return Done()
        return await world.ask(message.rank if isinstance(message, Pull) else 0, message)

    def _stop_run(self, run_id: str) -> None:
        for world in self.worlds.values():
            if run_id in world.runs:
                world.runs.stop(run_id)
                return
        raise NotFound(f"run {run_id!r} has ended.")

    def _subscribe(self, run_id: str, connection: Connection) -> None:
        for world in self.worlds.values():
            if world.runs.active is not None and world.runs.active.record.run_id == run_id:
                world.runs.active.followers.add(connection)
                return
        raise NotFound(f"run {run_id!r} has ended.")

    @staticmethod
    def _with_memory(description: dict[str, Any]) -> dict[str, Any]:
        for row in description["ranks"]:
            with contextlib.suppress(psutil.Error):
                row["rss"] = psutil.Process(row["pid"]).memory_info().rss
        return description
