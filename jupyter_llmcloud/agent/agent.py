"""The node agent: listens on a unix socket, owns worlds and replicas, ends with its lease."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from jupyter_llmcloud import config
from jupyter_llmcloud.agent import preemption
from jupyter_llmcloud.agent.failover.leader_link import LeaderLinks
from jupyter_llmcloud.agent.failover.standby import Standby
from jupyter_llmcloud.agent.gpus import GpuStats
from jupyter_llmcloud.agent.heartbeats import by_itself
from jupyter_llmcloud.agent.node_services import NodeServices
from jupyter_llmcloud.agent.replicas import Replicas
from jupyter_llmcloud.agent.resources import Ours, ResourceMonitor
from jupyter_llmcloud.agent.runs.library_versions import library_versions
from jupyter_llmcloud.agent.world.led_world import LedWorlds
from jupyter_llmcloud.core.parallel import plan
from jupyter_llmcloud.errors import LLMCloudError, UsageError
from jupyter_llmcloud.protocol.agent_messages import (
    AgentDescription,
    Describe,
    DescribeReplicas,
    DescribeResources,
    DescribeWorld,
    DumpStacks,
    EndReplica,
    Execute,
    LaunchReplica,
    ListVariables,
    Names,
    Pull,
    Push,
    ReleaseWorld,
    RenewLease,
    ReplicaDescription,
    ReplicaList,
    ResizeWorld,
    SaveCheckpoint,
    Shutdown,
    StartWorld,
    StopRun,
    StopWorld,
    Submitted,
    Subscribe,
    WorldDescription,
)
from jupyter_llmcloud.protocol.connection import AGENT_SOCKET, Connection
from jupyter_llmcloud.protocol.frames import Unreadable
from jupyter_llmcloud.protocol.rank_messages import Follow, LinkMessage
from jupyter_llmcloud.protocol.rpc import Request, Responder, refusal
from jupyter_llmcloud.storage.runs import RunFolder
from jupyter_llmcloud.system import alert_sinks, unix_sockets
from jupyter_llmcloud.system.atomic_files import write_json

LEASE_CHECK_S = 1.0
LEAVE_CHECK_S = 0.05


@dataclass(frozen=True)
class Lifetimes:
    """How long an agent stays, in seconds.

    Attributes:
        lease_s: when no worker holds a connection and nothing runs.
        first_lease_s: for its first worker, at least.
        leave_s: for checkpoints, when it is told to end by SIGTERM.
        stays_s: what ranks are forked from, for the agent that takes this one's place, when this one is killed.
    """

    lease_s: float
    first_lease_s: float = 0.0
    leave_s: float = config.LEAVE_S
    stays_s: float = 0.0


class Agent:
    """One per Dask worker.

    Args:
        folder: where its socket, logs and `agent.json` live (0700).
        name: of the worker.
        interface: address on which ranks of other hosts reach this one.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        interface: str,
        num_slots: int | None,
        lifetimes: Lifetimes,
    ) -> None:
        self.folder = folder
        self.name = name
        self.lifetimes = lifetimes
        self.node = NodeServices.build(folder, str(folder / AGENT_SOCKET), interface, num_slots, lifetimes.stays_s)
        self.replicas = Replicas(folder, self.node.devices, self.node.zygote)
        self.worlds = LedWorlds(self.node)
        self.takeovers = Standby(self.node.address, self.node.led, self.worlds.lead_on)
        self.leader_links = LeaderLinks(self.node.groups, self.takeovers.expect, self.node.address)
        self._held_until = time.monotonic() + max(lifetimes.lease_s, lifetimes.first_lease_s)
        self._finished: asyncio.Future[bool] = asyncio.get_running_loop().create_future()  # whether by a signal
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_leaving = False

    # --- life ---

    async def serve(self) -> None:
        """Listen until shut down or until the lease has ended."""
        server = await unix_sockets.listen(self.node.address, self._connected, limit=1 << 20)
        self._announce()
        self.node.warm()
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, library_versions)  # known when the first run asks for them
        loop.add_signal_handler(signal.SIGTERM, self._take_leave)
        loop.add_signal_handler(signal.SIGUSR1, self._notice, True)
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        notices = preemption.watch(config.preemption_notice(), self._notice)
        watches = [asyncio.create_task(self._watch_leases()), asyncio.create_task(notices)]
        was_signalled = await self._finished
        for watch in watches:
            watch.cancel()
        server.close()
        await self._close(was_signalled)

    def _take_leave(self) -> None:
        """The host or its place in a batch system is taken away: everything here is told so, and ends soon anyway."""
        if not self._is_leaving:
            self._is_leaving = True
            self.node.groups.outlive_sigterm()
            self._do(self._leave())

    def _notice(self, is_given: bool) -> None:
        """The host will be taken away soon: nothing new begins here, and what can goes on elsewhere.

        What cannot is saved, and goes on here until the end comes.
        """
        if is_given and not self.node.devices.is_closed:
            self._do(self._hand_over())
        self.node.devices.is_closed = is_given

    async def _hand_over(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.lifetimes.leave_s):
                self.leader_links.leave()
                await self.worlds.hand_over()

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(self.lifetimes.leave_s):
                self.leader_links.leave()
                await self.worlds.save()
                while self.leader_links.hosts_ranks:
                    await asyncio.sleep(LEAVE_CHECK_S)
        except TimeoutError:
            pass  # whoever was waited for has had its time
        finally:
            self._finish(was_signalled=True)  # also when something failed that nobody foresaw

    def _finish(self, was_signalled: bool = False) -> None:
        if not self._finished.done():
            self._finished.set_result(was_signalled)

    def _announce(self) -> None:
        me = psutil.Process()
        about = {"pid": me.pid, "started": me.create_time(), **self.describe().as_dict()}
        write_json(self.folder / "agent.json", about, durable=False)  # of a process, which no loss of power outlives

    async def _close(self, was_signalled: bool) -> None:
        self.takeovers.close()
        self.worlds.close(leave=was_signalled)
        self.node.end_groups()
        await self.replicas.close()
        self.node.close()
        await asyncio.to_thread(alert_sinks.finish)
        for name in ("agent.json", "agent.sock"):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    async def _watch_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_CHECK_S)
            now = time.monotonic()
            with by_itself():
                self.worlds.heartbeat(now)
                self.leader_links.heartbeat()
            if self.node.is_held or self.worlds or self.node.groups:  # a world has a lease of its own, on its leader
                self._held_until = now + self.lifetimes.lease_s
            elif now > self._held_until:
                self._finish()

    def describe(self) -> AgentDescription:
        """What it is, and what it holds now."""
        return AgentDescription(
            name=self.name,
            pid=os.getpid(),
            host=socket.gethostname(),
            address=self.node.address,
            **self.node.describe_slots(),
            worlds=self.worlds.describe(),
            begun=list(self.worlds.begun),
            num_replicas=self.replicas.num_running,
            **self.replicas.describe_room(),
            num_runs=self.takeovers.num_waiting + self.worlds.num_active_runs,
            wants=self.worlds.num_wanted,
            is_warm=self.node.zygote.is_warm,
            is_leaving=self._is_leaving or self.node.devices.is_closed,
            stands_by=self.leader_links.stands_by,
        )

    @cached_property
    def resources(self) -> ResourceMonitor:
        """What its host and its processes take."""
        return ResourceMonitor(self._processes, GpuStats(self.node.devices.gpus))

    def _processes(self) -> Iterator[Ours]:
        yield Ours(pid=os.getpid(), kind="agent")
        yield from self.node.processes()
        yield from self.replicas.processes()

    # --- connections ---

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer, "whoever asks this node agent")
        try:
            async for message in connection.messages():
                if isinstance(message, LinkMessage):
                    self.leader_links.hear(message, connection)
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
        self.node.forget(connection)
        self.worlds.forget(connection)
        self.leader_links.forget(connection)

    # --- requests ---

    @cached_property
    def _responder(self) -> Responder:
        """What this agent answers; every handler is given the connection besides."""
        responder = Responder("the node agent")
        responder.on(Execute, self._execute)
        responder.on(Push, lambda asked, who: self.worlds.get(asked.world_id).push(asked, who))
        responder.on(Pull, lambda asked, who: self.worlds.get(asked.world_id).ask(asked.rank, asked, who))
        responder.on(Names, lambda asked, who: self.worlds.get(asked.world_id).ask(asked.rank, asked, who))
        responder.on(StopRun, lambda asked, _: self.worlds.stop_run(asked))
        responder.on(SaveCheckpoint, lambda asked, _: self.worlds.save_run(asked))
        responder.on(Subscribe, self.worlds.subscribe)
        responder.on(StartWorld, self.worlds.start)
        responder.on(ResizeWorld, lambda asked, who: self.worlds.get(asked.world_id).resize(asked, who))
        responder.on(StopWorld, lambda asked, _: self.worlds.end(asked.world_id))
        responder.on(ReleaseWorld, lambda asked, _: self.worlds.get(asked.world_id).release(asked.grace_s))
        responder.on(DescribeWorld, self._describe_world)
        responder.on(DumpStacks, lambda asked, _: self.worlds.get(asked.world_id).stacks())
        responder.on(ListVariables, lambda asked, _: self.worlds.get(asked.world_id).variables())
        responder.on(Describe, lambda *_: self.describe())
        responder.on(DescribeResources, lambda *_: self.resources.describe())
        responder.on(Follow, self.leader_links.follow)
        responder.on(LaunchReplica, self._start_replica)
        responder.on(EndReplica, lambda asked, _: self.replicas.stop(asked.replica_id))
        responder.on(DescribeReplicas, lambda *_: ReplicaList(replicas=self.replicas.describe()))
        responder.on(RenewLease, self._renew_lease)
        responder.on(Shutdown, self._shut_down)
        return responder

    async def _execute(self, cell: Execute, connection: Connection) -> Submitted | None:
        world = self.worlds.get(cell.world_id)
        if cell.precision in ("fp16", "fp8") and not self.node.has_gpus:
            raise UsageError(f"--precision {cell.precision} needs GPUs, these ranks run on CPUs. Choose bf16 or no.")
        num_ranks = len(cell.ranks) or world.size
        plan.check(cell.plan, cell.compress_gradients, num_ranks, world.size)
        plan.check_balance(cell.balance, cell.plan, num_ranks, world.size)
        if cell.background:
            RunFolder(Path(cell.folder)).check_free_space()  # whoever waits for its end will look there only
            world.runs.announce(cell)
            self._do(world.runs.execute(cell, None))
            return Submitted(run_id=cell.run_id)
        world.use(connection)
        await world.runs.execute(cell, connection)
        return None

    def _describe_world(self, asked: DescribeWorld, connection: Connection) -> WorldDescription:
        world = self.worlds.get(asked.world_id)
        world.use(connection)
        return world.describe_with_memory()

    async def _start_replica(self, asked: LaunchReplica, _: Connection) -> ReplicaDescription:
        return ReplicaDescription(**await self.replicas.start(asked.endpoint, asked.replica_id, asked.spec))

    def _renew_lease(self, asked: RenewLease, worker: Connection) -> None:
        if self.node.held_by(worker, asked.finds_capacity):
            self.worlds.worker_joined()
        self.takeovers.inherit()

    def _shut_down(self, asked: Shutdown, _: Connection) -> None:
        if asked.cluster_stays:
            self._take_leave()
        elif not self._is_leaving:  # else whoever asks is taken away, too
            asyncio.get_running_loop().call_later(0.05, self._finish)  # when the reply has left
