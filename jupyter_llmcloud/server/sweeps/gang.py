"""The ranks on which the trials of a sweep run, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.errors import Busy, ConnectionLost, LLMCloudError
from jupyter_llmcloud.protocol.agent_messages import Execute, Journaled, RunEnded, StartWorld, StopRun, StopWorld
from jupyter_llmcloud.protocol.frames import Message

if TYPE_CHECKING:
    from jupyter_llmcloud.cluster.clusters import ClusterPool
    from jupyter_llmcloud.protocol.client import AgentConnection

START_TIMEOUT_S = 300.0
LEASE_S = 5.0  # of its world, when the server that sees to the sweep has gone
WAIT_S = 0.25  # how often a gang that waits for slots asks again
STOP_WORLD_S = 15.0


@dataclass(frozen=True)
class GangPlan:
    """Which ranks a gang has: how many, where, for whom."""

    num_ranks: int | None
    cluster: str | None
    priority: int
    owner: str
    folder: str


@dataclass(frozen=True)
class ClusterDoors:
    """How ranks are found and reached."""

    pool: Callable[[], Awaitable[ClusterPool]]
    agent: Callable[[str], Awaitable[AgentConnection]]


class Gang:
    """Ranks with one process group, and the trial that they run.

    Attributes:
        cluster: on which they are.
        address: of their leading agent.
        world_id: of their world.
        num_ranks: how many they are.
    """

    def __init__(self, placement: dict[str, Any], connection: AgentConnection) -> None:
        self.cluster = str(placement["cluster"])
        self.address = str(placement["agents"][0]["address"])
        self.world_id = str(placement["world_id"])
        self.num_ranks = int(placement["num_ranks"])
        self._connection = connection
        self._ended: asyncio.Future[RunEnded] | None = None
        self._on_values: Callable[[int, int | None, dict[str, float]], None] = lambda *_: None
        self._run_id = ""
        self._is_sent = asyncio.Event()  # the cell of the trial
        connection.hear = self._hear

    @classmethod
    async def open(cls, doors: ClusterDoors, plan: GangPlan, ticket: str, note: Callable[[str], None]) -> Gang:
        """Find ranks, however long others have the slots; `note` is told what is waited for."""
        while True:
            try:
                pool = await doors.pool()
                placement = await pool.place(plan.cluster, plan.num_ranks, ticket, priority=plan.priority)
                connection = await doors.agent(placement["agents"][0]["address"])
                try:
                    await connection.request(_start(placement, plan), START_TIMEOUT_S)
                except BaseException:
                    await connection.close()
                    raise
                note("")
                return cls(placement, connection)
            except Busy as busy:
                note(f"waits for free slots. {busy}")
                await asyncio.sleep(WAIT_S)

    async def run(self, cell: Execute, on_values: Callable[[int, int | None, dict[str, float]], None]) -> RunEnded:
        """Execute a cell on all ranks; `on_values` gets rank, step and metrics. Raises LLMCloudError."""
        loop = asyncio.get_running_loop()
        self._is_sent.clear()
        self._ended, self._on_values, self._run_id = loop.create_future(), on_values, cell.run_id
        gone = asyncio.ensure_future(self._connection.gone.wait())
        refused = asyncio.ensure_future(self._send(cell))
        waited: set[asyncio.Future[Any]] = {self._ended, refused, gone}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                return self._ended.result()
            if refused.done():
                refused.result()
            raise ConnectionLost("the node agent of its ranks has gone.")
        finally:
            gone.cancel()
            refused.cancel()
            await asyncio.gather(gone, refused, return_exceptions=True)
            self._run_id = ""

    async def _send(self, cell: Execute) -> None:
        """Hand the cell to the agent, which answers only when it refuses it."""
        self._is_sent.set()  # who waits for that goes on in a later turn of the loop
        await self._connection.request(cell, None)

    def _hear(self, message: Message) -> None:
        match message:
            case Journaled(run_id=known, journal="metrics") if known == self._run_id:
                for record in message.records:
                    if values := record.get("values"):
                        self._on_values(message.rank, record.get("step"), values)
            case RunEnded(run_id=known) if known == self._run_id:
                if self._ended is not None and not self._ended.done():
                    self._ended.set_result(message)

    async def stop(self) -> None:
        """Press Stop for the trial, behind its cell: an agent does not know a run before."""
        if self._run_id:
            await self._is_sent.wait()
            with suppress(LLMCloudError):  # it has ended, or its agent is gone
                await self._connection.request(StopRun(run_id=self._run_id))

    async def close(self) -> None:
        """End its ranks."""
        with suppress(LLMCloudError):
            if not self._connection.gone.is_set():
                await self._connection.request(StopWorld(world_id=self.world_id), STOP_WORLD_S)
        await self._connection.close()


def _start(placement: dict[str, Any], plan: GangPlan) -> StartWorld:
    return StartWorld(
        world_id=placement["world_id"],
        agents=placement["agents"],
        owner=plan.owner,
        cwd=plan.folder,
        lease_s=LEASE_S,
    )
