"""A world that is led from here, with its runs and those who use it; and all such worlds of an agent."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any

import psutil

from jupyter_llmcloud.agent.heartbeats import by_itself
from jupyter_llmcloud.agent.node_services import NodeServices
from jupyter_llmcloud.agent.world.run_queue import RunQueue
from jupyter_llmcloud.agent.world.world import World
from jupyter_llmcloud.errors import ConnectionLost, NameTaken, NotFound
from jupyter_llmcloud.protocol.agent_messages import (
    CheckpointSaved,
    Execute,
    Push,
    Replayed,
    ResizeWorld,
    SaveCheckpoint,
    StartWorld,
    StopRun,
    Subscribe,
    WorldDescription,
    WorldStacks,
    WorldVariables,
)
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Message, replace
from jupyter_llmcloud.protocol.rank_messages import AgentLeaves
from jupyter_llmcloud.protocol.rpc import R, Request
from jupyter_llmcloud.storage.runs import RunRecord

_STOPPED = "the world was stopped."
_TAKEN_AWAY = "the node agent was told to end (SIGTERM), with its host or its place in a batch system."


class LedWorld:
    """Joins the ranks and the runs, which do not know each other.

    Args:
        worlds: those among which it is, until it ends.
    """

    def __init__(self, node: NodeServices, spec: StartWorld, worlds: LedWorlds) -> None:
        self.world_id = spec.world_id
        self._users: set[Connection] = set()
        self._spec = spec
        self._world = World(node, spec, self)
        self.runs = RunQueue(node, self._world, lambda: worlds.end(spec.world_id))
        self._started = time.time()
        self._unused_since = time.monotonic()
        self._lease_s = spec.lease_s
        self._giving_up: set[asyncio.Task[None]] = set()

    # --- what its ranks say, and its runs want to know ---

    @property
    def is_busy(self) -> bool:
        """Whether a run is executed now."""
        return self.runs.active is not None

    @property
    def size(self) -> int:
        """How many ranks it has."""
        return self._world.size

    def on_message(self, rank: int, message: Message) -> None:
        """A rank says something, or the agent that hosts it elsewhere."""
        if isinstance(message, AgentLeaves):
            task = asyncio.create_task(self._give_up(rank))
            self._giving_up.add(task)
            task.add_done_callback(self._giving_up.discard)
        else:
            self.runs.on_message(rank, message)

    async def _give_up(self, rank: int) -> None:
        await self.runs.save()
        self._world.give_up(rank, _TAKEN_AWAY)

    def on_death(self, rank: int, name: str, reason: str) -> None:
        """The process of a rank has gone."""
        self.runs.on_death(rank, name, reason)

    # --- what is asked of it ---

    async def start(self) -> None:
        """Start its ranks."""
        await self._world.start()

    async def resize(self, asked: ResizeWorld, connection: Connection) -> WorldDescription:
        """Have more or fewer ranks, when no run is under way; says what those that are new lack."""
        async with self.runs.lock:
            if connection.closed:
                raise ConnectionLost("whoever asked has gone.")
            before = self._world.size
            await self._world.resize(asked.num_ranks, asked.agents)
            self.runs.resized(before)
            return replace(self.describe(), notes=self._world.take_notes())

    async def ask(self, rank: int, request: Request[R], connection: Connection) -> R:
        """Send a request to a rank when no run is under way; raises what it refuses with.

        Nothing is done any more for who has given up waiting for that.
        """
        async with self.runs.lock:
            if connection.closed:
                raise ConnectionLost("whoever asked has gone.")
            return await self._world.ask(rank, request)

    async def push(self, asked: Push, connection: Connection) -> None:
        """Set variables on ranks."""
        self.runs.note_pushed(dict.fromkeys(asked.texts, ""))  # as long as not all of them have it
        for rank in asked.ranks or range(self._world.size):
            await self.ask(rank, asked, connection)
        self.runs.note_pushed(asked.texts)
        if not asked.ranks:
            self._world.remember_push(asked)

    async def stacks(self) -> WorldStacks:
        """What every thread of every rank is doing now."""
        return await self._world.stacks()

    async def variables(self) -> WorldVariables:
        """The user's variables of every rank."""
        return await self._world.variables()

    def describe(self) -> WorldDescription:
        """For `%world` and the server."""
        run = self.runs.active
        return WorldDescription(
            world_id=self.world_id,
            world_size=self._world.size,
            owner=self._spec.owner,
            generation=self._world.generation,
            run_id=run.run_id if run is not None else "",
            ranks=self._world.rows(run.ranks if run is not None else []),
        )

    def describe_with_memory(self) -> WorldDescription:
        """As `describe`, with the memory of the ranks that are here."""
        description = self.describe()
        for row in description.ranks:
            with contextlib.suppress(psutil.Error):
                row["rss"] = psutil.Process(row["pid"]).memory_info().rss
        return description

    def summary(self) -> dict[str, Any]:
        """For the description of the agent."""
        run = self.runs.active
        return {
            "world_id": self.world_id,
            "owner": self._spec.owner,
            "world_size": self._world.size,
            "run_id": run.run_id if run is not None else "",
            "started": self._started,
            "ends_in_s": self._ends_in_s(time.monotonic()),
        }

    # --- how long it lives ---

    def use(self, connection: Connection) -> None:
        """Whoever asks over this connection uses the world: it has its whole lease again."""
        self._users.add(connection)
        self._lease_s = self._spec.lease_s

    def release(self, grace_s: float) -> None:
        """Its notebook was shut down: there is nobody to find it again, but for one who opens the notebook at once."""
        self._lease_s = min(grace_s, self._spec.lease_s)

    def _ends_in_s(self, now: float) -> float | None:
        """When it ends unless somebody uses it; None while it is used."""
        if self._users or not self.runs.is_idle:
            return None
        return max(self._unused_since, self.runs.idle_since) + self._lease_s - now

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        if connection in self._users:
            self._users.discard(connection)
            self._unused_since = time.monotonic()
        self.runs.forget(connection)

    def heartbeat(self, now: float) -> bool:
        """Called every second; False when nobody has used the world for so long that it ends.

        Ranks beside a leader that stands still end before another one leads.
        """
        ends_in_s = self._ends_in_s(now)
        if ends_in_s is not None and ends_in_s < 0:
            return False
        self._world.live_until(self.runs.until)
        return True

    async def save(self) -> None:
        """Have a checkpoint of the run that is executed, where it saves any."""
        await self.runs.save()

    def leave(self) -> None:
        """The host or its place in a batch system is taken away: a run with restarts goes on elsewhere."""
        if self.runs.leave():
            self._world.leave()
        else:
            self._world.close(_STOPPED)
            self.runs.lose_ranks("RankLost", _TAKEN_AWAY)

    def announce_end(self) -> None:
        """The host will be taken away soon: the run that is executed, if there is one, uses up no restart by that."""
        if self.runs.active is not None:
            self.runs.active.announce_end()

    def hand_over(self) -> bool:
        """The host will be taken away soon; returns whether the run goes on under an agent that stands by."""
        run = self.runs.active
        if run is None or run.until is None or not self.runs.leave():
            return False
        self._world.leave()
        return True

    def close(self) -> None:
        """End every rank, as after a Stop; whoever follows its run is told."""
        self.runs.stop_active()
        self._world.close(_STOPPED)
        self.runs.lose_ranks("WorldError", _STOPPED)


class LedWorlds:
    """The worlds that are led from this agent."""

    def __init__(self, node: NodeServices) -> None:
        self.begun: deque[str] = deque(maxlen=100)  # worlds that were started, the newest last
        self._node = node
        self._worlds: dict[str, LedWorld] = {}

    def __bool__(self) -> bool:
        return bool(self._worlds)

    def get(self, world_id: str) -> LedWorld:
        """The world of this id. Raises NotFound."""
        if world_id not in self._worlds:
            raise NotFound(
                "the world has ended: its lease ran out or somebody stopped it. The next cell starts a new one."
            )
        return self._worlds[world_id]

    async def start(self, spec: StartWorld, connection: Connection) -> WorldDescription:
        """Start a world for whoever asks over this connection. Raises NameTaken, WorldError, Busy."""
        if spec.world_id in self._worlds:
            raise NameTaken(f"there is a world {spec.world_id!r} already.")
        world = self._worlds[spec.world_id] = LedWorld(self._node, spec, self)
        world.use(connection)
        try:
            await world.start()
        except BaseException:
            self._worlds.pop(spec.world_id, None)
            raise
        self.begun.append(spec.world_id)
        if connection.closed and world in self._worlds.values():
            self.end(spec.world_id)  # who asked for it has gone, and nobody else knows of it
        return world.describe()

    async def lead_on(
        self, spec: StartWorld, cell: Execute, definitions: list[Replayed], record: RunRecord, term: int
    ) -> None:
        """See a run through whose leader has gone, in a world like the one that it had; nobody owns that yet."""
        world = self._worlds[spec.world_id] = LedWorld(self._node, spec, self)
        await world.runs.lead_on(cell, definitions, record, term)

    def end(self, world_id: str) -> None:
        """End every rank of a world. Raises NotFound."""
        world = self._worlds.pop(world_id, None)
        if world is None:
            raise NotFound(f"there is no world {world_id!r} on this worker.")
        world.close()

    # --- runs ---

    @property
    def num_active_runs(self) -> int:
        """Runs that are executed now."""
        return sum(world.is_busy for world in self._worlds.values())

    @property
    def num_wanted(self) -> int:
        """Ranks that elastic runs could have besides theirs."""
        return sum(world.runs.num_wanted for world in self._worlds.values())

    def stop_run(self, asked: StopRun) -> None:
        """Stop pressed for a run that is executed or queued here. Raises NotFound."""
        for world in self._worlds.values():
            if asked.run_id in world.runs:
                world.runs.stop(asked.run_id)
                return
        raise NotFound(f"run {asked.run_id!r} has ended.")

    async def save_run(self, asked: SaveCheckpoint) -> CheckpointSaved:
        """Have a checkpoint of a run that is executed here. Raises NotFound, UsageError, WorldError."""
        for world in self._worlds.values():
            if asked.run_id in world.runs:
                return CheckpointSaved(step=await world.runs.save_run(asked.run_id))
        raise NotFound(f"run {asked.run_id!r} has ended.")

    def subscribe(self, asked: Subscribe, connection: Connection) -> None:
        """Have a run that is executed now told to this connection. Raises NotFound."""
        for world in self._worlds.values():
            if world.runs.is_active(asked.run_id):
                world.runs.follow(connection)
                return
        raise NotFound(f"run {asked.run_id!r} has ended.")

    def worker_joined(self) -> None:
        """A worker that knows the cluster holds this agent from now on: runs that wait for capacity ask it at once."""
        for world in self._worlds.values():
            world.runs.worker_joined()

    # --- life ---

    def describe(self) -> list[dict[str, Any]]:
        """For the description of the agent."""
        return [world.summary() for world in self._worlds.values()]

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        for world in self._worlds.values():
            world.forget(connection)

    def heartbeat(self, now: float) -> None:
        """Called every second."""
        for world_id, world in list(self._worlds.items()):
            with by_itself():
                if not world.heartbeat(now):
                    self.end(world_id)

    async def save(self) -> None:
        """Have checkpoints of the runs that are executed, where they save any."""
        await asyncio.gather(*(world.save() for world in self._worlds.values()))

    async def hand_over(self) -> None:
        """The host will be taken away soon: runs are saved, and go on elsewhere where another agent stands by."""
        for world in self._worlds.values():
            world.announce_end()
        await self.save()
        for world_id, world in list(self._worlds.items()):
            if world.hand_over():
                self._worlds.pop(world_id, None)

    def close(self, *, leave: bool) -> None:
        """The agent ends; its runs go on elsewhere where they can when it is to `leave`."""
        for world in self._worlds.values():
            if leave:
                world.leave()
            else:
                world.close()
