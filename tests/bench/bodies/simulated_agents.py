"""Agents of a cluster, simulated: real Dask workers with the real plugin, whose agents speak the protocol and train nothing.

`python -m tests.bench.bodies.simulated_agents SCHEDULER FIRST NUMBER FOLDER` prints a line when all have registered; each line on its
standard input is answered with what has been counted since it began, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask
from distributed import Worker

from jupyter_llmcloud.agent.failover.leader_link import LeaderLinks
from jupyter_llmcloud.agent.ranks.local_group import GroupSpec, RankEvents
from jupyter_llmcloud.cluster import worker_plugin
from jupyter_llmcloud.cluster.dask_config import DASK_SETTINGS
from jupyter_llmcloud.core.run.hang import heartbeat_s
from jupyter_llmcloud.protocol.agent_messages import AgentDescription, Describe, Execute, RenewLease, Shutdown
from jupyter_llmcloud.protocol.connection import AGENT_SOCKET, Connection
from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rank_messages import (
    CellEnded,
    Follow,
    FollowAccepted,
    Heartbeat,
    Join,
    Joined,
    LinkMessage,
    MetricRecords,
    StepQuery,
    StepReply,
    StopAt,
)
from jupyter_llmcloud.protocol.rpc import Done, Request, Responder
from jupyter_llmcloud.system import unix_sockets

AT_ONCE = 20
METRICS_S = 1.0  # between two records of metrics of a rank
COUNTS: Counter[str] = Counter()


class SimulatedRank:
    """Answers as the process of a rank does, and reports a loss once a second."""

    def __init__(self, rank: int, world_size: int, events: RankEvents) -> None:
        self.rank = rank
        self._world_size = world_size
        self._events = events
        self._running: asyncio.Task[None] | None = None

    def send(self, message: Message) -> None:
        """What the leader says to it."""
        COUNTS[f"leader to rank: {type(message).__name__}"] += 1
        match message:
            case Join():
                self._say(Joined(generation=message.generation))
            case Execute():
                self._running = asyncio.create_task(self._train(message))
            case StepQuery():
                self._say(StepReply(step=10))
            case StopAt() if self._running is not None and message.step >= 0:
                self._running.cancel()

    def _say(self, message: Message) -> None:
        COUNTS[f"rank to leader: {type(message).__name__}"] += 1
        self._events.on_message(self.rank, message)

    async def _train(self, cell: Execute) -> None:
        beats, number = 0.0, 0
        groups = {"world/gloo": [[], 10, 10]}
        try:
            while True:
                number += 1
                values = {"loss": 1 / number}
                self._say(MetricRecords(records=[{"seq": number, "t": time.time(), "step": number, "values": values}]))
                if time.monotonic() - beats >= heartbeat_s(cell.hang_after_s):
                    beats = time.monotonic()
                    self._say(Heartbeat(run_id=cell.run_id, phase="compute", groups=groups, step=number, working=True))
                await asyncio.sleep(METRICS_S)
        except asyncio.CancelledError:
            self._say(CellEnded(run_id=cell.run_id, interrupted=True, groups=groups, reply_to=cell.number))

    def kill(self) -> None:
        if self._running is not None:
            self._running.cancel()

    def look(self, dump: bool = False) -> None:
        """Its side thread is never silent."""


class SimulatedGroup:
    """The interface of a LocalGroup, without processes."""

    def __init__(self, spec: GroupSpec, events: RankEvents) -> None:
        self.links: dict[int, SimulatedRank] = {}
        self.num_threads: dict[int, int] = {}
        self._spec = spec
        self._events = events

    async def start(
        self, ranks: Sequence[int], local_ranks: Sequence[int], num_threads: Mapping[int, int]
    ) -> dict[int, int]:
        """As many ranks as are asked for."""
        for rank in ranks:
            self.links[rank] = SimulatedRank(rank, self._spec.world_size, self._events)
            self.num_threads[rank] = num_threads.get(rank, 1)
        return {rank: os.getpid() for rank in ranks}

    def live_until(self, until: float | None) -> None:
        """They live on."""

    def drop(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            self.links.pop(rank).kill()

    def close(self) -> None:
        self.drop(list(self.links))


class SimulatedGroups:
    """Stands for LocalGroups."""

    def make(self, spec: GroupSpec, events: RankEvents) -> Any:
        return SimulatedGroup(spec, events)


class SimulatedAgent:
    """Listens where an agent does, and follows leaders by the agent's own code."""

    def __init__(self, folder: Path, name: str, num_slots: int) -> None:
        self._folder = folder
        self._name = name
        self._num_slots = num_slots
        self._links = LeaderLinks(SimulatedGroups(), lambda _run, _at: None)  # type: ignore[arg-type]
        self._responder = Responder("the node agent")
        self._responder.on(Describe, lambda _, __: self.describe())
        self._responder.on(RenewLease, lambda _, __: Done())
        self._responder.on(Shutdown, lambda _, __: Done())
        self._responder.on(Follow, self._follow)
        self._tasks: set[asyncio.Task[Any]] = set()

    def _follow(self, asked: Follow, connection: Connection) -> FollowAccepted:
        return self._links.follow(asked, connection)

    async def start(self) -> dict[str, Any]:
        """Listen; returns what an agent says of itself."""
        await unix_sockets.listen(str(self._folder / AGENT_SOCKET), self._connected, limit=1 << 20)
        self._do(self._heartbeat())
        return {"pid": os.getpid(), "started": 0.0, **self.describe().as_dict()}

    def _do(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._links.heartbeat()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer, "whoever asks")
        try:
            async for message in connection.messages():
                COUNTS[f"to agent: {type(message).__name__}"] += 1
                if isinstance(message, LinkMessage):
                    self._links.hear(message, connection)
                elif isinstance(message, Request):
                    self._do(self._responder.serve(message, connection.send, connection))
        finally:
            self._links.forget(connection)
            connection.close()

    def describe(self) -> AgentDescription:
        """Its slots are always free: what holds them is another part's to test."""
        return AgentDescription(
            name=self._name, pid=os.getpid(), host=socket.gethostname(), address=str(self._folder / AGENT_SOCKET),
            num_slots=self._num_slots, free_slots=self._num_slots, has_gpus=False, worlds=[], begun=[], num_replicas=0,
            num_runs=0, stands_by=[],
        )  # fmt: skip


async def _simulate(scheduler: str, first: int, number: int, folder: str) -> None:
    # As workers of clusters that we start; and each looks at the whole process, which all of them share.
    dask.config.set(DASK_SETTINGS | {"distributed.admin.system-monitor.interval": "60s"})
    agents: dict[Path, SimulatedAgent] = {}

    async def ensure(place: Path, worker: object, _interface: str, num_slots: int | None) -> dict[str, Any]:
        agents[place] = SimulatedAgent(place, str(worker), num_slots or 1)
        return await agents[place].start()

    worker_plugin.ensure_agent = ensure
    worker_plugin.living_agent = lambda place: {} if place in agents else None
    workers = [
        Worker(scheduler, name=f"s{first + index}", nthreads=1, dashboard=False, local_directory=folder)
        for index in range(number)
    ]
    for begin in range(0, number, AT_ONCE):
        await asyncio.gather(*(worker for worker in workers[begin : begin + AT_ONCE]))
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        COUNTS["asked"] += bool(line)
        print(json.dumps(COUNTS), flush=True)
    os._exit(0)  # a thousand workers that say good-bye are not what is measured


if __name__ == "__main__":
    asyncio.run(_simulate(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
