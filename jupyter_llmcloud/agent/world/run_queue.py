"""The runs of a world: one at a time, in the order they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jupyter_llmcloud.agent.failover.run_leadership import RunLeadership
from jupyter_llmcloud.agent.node_services import NodeServices
from jupyter_llmcloud.agent.runs.git_state import git_state
from jupyter_llmcloud.agent.runs.library_versions import library_versions
from jupyter_llmcloud.agent.runs.supervisor import RunSupervisor
from jupyter_llmcloud.agent.world.world import World
from jupyter_llmcloud.core.run.lifecycle import Finish
from jupyter_llmcloud.core.scheduling.elasticity import SizeBounds
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError, WorldError
from jupyter_llmcloud.protocol.agent_messages import Execute, RankState, Replayed, RunEnded
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Message, replace
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord


class RunQueue:
    """Those that are queued, and the active one.

    Args:
        world: whose ranks execute them.
        end_world: called when the world must not go on here.

    Attributes:
        active: the run that is executed now.
        lock: held by whoever uses the ranks.
        idle_since: when the last of them ended.
    """

    def __init__(self, node: NodeServices, world: World, end_world: Callable[[], None]) -> None:
        self.active: RunSupervisor | None = None
        self.lock = asyncio.Lock()
        self.idle_since = time.monotonic()
        self._node = node
        self._world = world
        self._end_world = end_world
        self._versions = library_versions()  # here, where ranks are about to be started, and not on the way of a cell
        self._resized_from = 0  # ranks before the world was resized, since the last run; 0 when it was not
        self._pushed: dict[str, str] = {}  # since the last run that finished: {name: its literal, or ""}
        self._beginning = ""  # the run whose ranks are being healed
        self._is_stopped = False  # meanwhile
        self._waiting: dict[str, asyncio.Future[Any]] = {}  # turns, by run

    @property
    def is_idle(self) -> bool:
        """Nothing is executed or queued."""
        return self.active is None and not self._waiting

    @property
    def until(self) -> float | None:
        """Until when no other agent leads the active run (seconds of the loop's clock); None: nobody stands by."""
        return self.active.until if self.active is not None else None

    def resized(self, num_ranks: int) -> None:
        """The world has another number of ranks than before, when it had so many: the next run is marked by it."""
        before = self._resized_from or num_ranks
        self._resized_from = before if before != self._world.size else 0

    def note_pushed(self, texts: Mapping[str, str]) -> None:
        """The record of the next run says what it found besides what cells made."""
        self._pushed |= texts

    async def execute(self, cell: Execute, connection: Connection | None) -> None:
        """Execute a cell when it is its turn; `connection` follows it."""
        if not await self._wait_for_ranks(cell, connection):
            self._never_began(cell, connection, "stopped")
            return
        try:
            self._beginning, self._is_stopped = cell.run_id, False
            await self._world.heal(coming=cell)
            self._beginning = ""
            if self._is_stopped:
                self._never_began(cell, connection, "stopped")
            else:
                await self._execute(cell, connection)
        except LLMCloudError as error:
            if connection is None or RunFolder(Path(cell.folder)).exists:  # nobody to refuse it to, or it has waited
                self._never_began(cell, None, "failed", error)
            if connection is not None:
                raise
        finally:
            self._beginning = ""
            self._is_over()
            self.lock.release()

    def announce(self, cell: Execute) -> None:
        """Have a record of a run that was taken on, for whoever asks for it before it is its turn."""
        with contextlib.suppress(OSError):
            RunFolder(Path(cell.folder)).create(self._record(cell, []), cell.source or cell.code)

    async def _wait_for_ranks(self, cell: Execute, connection: Connection | None) -> bool:
        """Wait until no other run is under way; False when the run was stopped meanwhile."""
        if not self.lock.locked() and not self._waiting:
            return await self.lock.acquire()
        run_id = cell.run_id
        with contextlib.suppress(OSError):  # so that it is known to have waited, should this agent be lost
            RunFolder(Path(cell.folder)).create(self._record(cell, self._phases(cell)), cell.source or cell.code)
        if connection is not None:
            ahead = f"for {self.active.run_id} to end" if self.active else "until the ranks have answered a request"
            connection.send(RankState(run_id=run_id, rank=-1, state="queued", detail=f"waits {ahead}"))
        turn = self._waiting[run_id] = asyncio.get_running_loop().create_future()  # cancelled by a Stop
        acquired = asyncio.ensure_future(self.lock.acquire())
        goes = False
        try:
            await asyncio.wait([acquired, turn], return_when=asyncio.FIRST_COMPLETED)
            goes = not turn.cancelled()
        finally:
            if not acquired.cancel() and not goes:  # both came in the same moment
                self.lock.release()
            del self._waiting[run_id]
        return goes

    def _never_began(
        self, cell: Execute, connection: Connection | None, state: str, error: Exception | None = None
    ) -> None:
        """The end of a run that was stopped in the queue, or found no ranks."""
        record = self._record(cell, self._phases(cell))
        record.state, record.ended = state, time.time()
        if error is not None:
            ename, evalue = type(error).__name__, str(error)
            record.errors = [
                {"rank": record.ranks[0], "ename": ename, "evalue": evalue, "traceback": [f"{ename}: {evalue}"]}
            ]
        with contextlib.suppress(OSError):
            RunFolder(Path(cell.folder)).create(record, cell.source or cell.code)
        if connection is not None:
            report = ["It had not begun: no rank has executed any of it."]
            connection.send(RunEnded(run_id=cell.run_id, state=state, errors=record.errors, report=report))

    def _phases(self, cell: Execute) -> list[dict[str, Any]]:
        """What went before the first run of this world, for its record."""
        phases = self._world.take_phases()
        if phases and cell.asked:
            phases.insert(0, (min(cell.asked, phases[0][0]), "finding a cluster"))
        return [{"t": round(at, 3), "phase": name} for at, name in phases]

    def _record(self, cell: Execute, history: list[dict[str, Any]]) -> RunRecord:
        return RunRecord(
            run_id=cell.run_id,
            name=cell.name,
            created=time.time(),
            ranks=self._ranks_of(cell),
            world_size=self._world.size,
            world_id=self._world.world_id,
            cluster=cell.cluster,
            agent=cell.agent or self._node.address,
            owner=cell.owner,
            spec=cell.spec,
            script=cell.script,
            history=history,
            versions=self._versions,
            topology=self._topology(),
            git=git_state(self._world.cwd),
            pushed={**self._pushed, **cell.pushed},
        )

    def _ranks_of(self, cell: Execute) -> list[int]:
        """Those that it names; who meant all may not know yet how many an elastic run has left."""
        means_all = self._world.is_reshaped and "ranks" not in cell.spec
        return list(range(self._world.size)) if means_all or not cell.ranks else cell.ranks

    def _check_size(self, cell: Execute, ranks: list[int]) -> None:
        if (bounds := SizeBounds.of(cell.elastic)) is None:
            return
        size = self._world.size
        if len(ranks) != size:
            raise UsageError(f"--elastic {cell.elastic} is for all ranks of a world, not for {len(ranks)} of {size}.")
        if not bounds.least <= size <= bounds.most:
            raise UsageError(
                f"--elastic {cell.elastic}: the run begins on the {size} ranks that its world has. Begin with -n"
                f" {bounds.most}, resize the world (%world resize), or give other bounds."
            )

    def _topology(self) -> dict[str, Any]:
        threads = self._world.num_threads
        return {
            "hosts": self._world.ranks_of_hosts,
            "threads": [threads[rank] for rank in sorted(threads)],
            "device": "gpu" if self._node.has_gpus else "cpu",
        }

    async def _execute(self, cell: Execute, connection: Connection | None) -> None:
        self._world.cells[cell.filename] = cell.execution_count
        record = self._record(cell, self._phases(cell))
        self._check_size(cell, record.ranks)
        folder = RunFolder(Path(cell.folder))
        reference = len(record.ranks) if cell.elastic else 0
        first = replace(cell, ranks=record.ranks, number=0, reference_ranks=reference)
        run = self.active = self._make_run(first, record, folder)
        if connection is not None:
            run.follow(connection)
        try:
            folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            await run.claim_first(self._world.replay_cells, self._world.num_threads)
        except OSError as error:
            raise WorldError(f"the run's folder cannot be made: {error.strerror}: {cell.folder}.") from None
        run.begin()
        if self._resized_from:
            run.note_resize(self._resized_from, self._world.size)
        self._resized_from = 0
        self._pushed = {}
        await self._see_through(run)
        if run.record.state != "finished":  # the next one finds it on the ranks as well
            self._pushed = {**run.record.pushed, **self._pushed}
        self._after(cell, run.ended.result())

    async def lead_on(self, cell: Execute, definitions: list[Replayed], record: RunRecord, term: int) -> None:
        """See a run through whose leader has gone: this world has no ranks yet."""
        self._world.inherit(record.world_size, definitions, record.agents_left_out)
        cells = [known for known in (*definitions, cell) if isinstance(known, Execute)]
        self._world.cells |= {known.filename: known.execution_count for known in cells}
        async with self.lock:
            run = self._make_run(replace(cell, ranks=record.ranks), record, RunFolder(Path(cell.folder)), term)
            self.active = run
            try:
                run.take_over()
                await self._see_through(run)
            finally:
                self._is_over()
        if not self._world.links and not self._world.closed:
            self._end_world()  # its ranks could not be started

    def _make_run(self, cell: Execute, record: RunRecord, folder: RunFolder, term: int = -1) -> RunSupervisor:
        def make_lead(on_standby_lost: Callable[[], None]) -> RunLeadership:
            return RunLeadership(
                self._node,
                self._world.spec,
                folder.path,
                on_change=self._world.live_until,
                on_standby_lost=on_standby_lost,
                term=term,
            )

        return RunSupervisor(cell, record, folder, self._world, make_lead)

    async def _see_through(self, run: RunSupervisor) -> None:
        """Wait for the end of a run; of one that is led elsewhere, nothing may go on here."""
        await run.ended
        if not run.is_recorded and not self._world.closed:
            self._end_world()
        await run.settled()

    def _is_over(self) -> None:
        self.active = None
        self.idle_since = time.monotonic()

    def on_message(self, rank: int, message: Message) -> None:
        """A rank says something."""
        if self.active is not None:
            self.active.on_message(rank, message)

    def on_death(self, rank: int, name: str, reason: str) -> None:
        """The process of a rank has gone."""
        if self.active is not None:
            self.active.rank_died(rank, name, reason)

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        if self.active is not None:
            self.active.forget(connection)

    def follow(self, connection: Connection) -> None:
        """Tell this connection of the active run."""
        if self.active is not None:
            self.active.follow(connection)

    def worker_joined(self) -> None:
        """A worker that knows the cluster holds this agent from now on."""
        if self.active is not None:
            self.active.worker_joined()

    @property
    def num_wanted(self) -> int:
        """Ranks that the active run could have besides its own."""
        return self.active.num_wanted if self.active is not None and not self.active.is_over else 0

    def stop_active(self) -> None:
        """Stop pressed for the run that is executed now, if there is one."""
        if self.active is not None and not self.active.is_over:
            self.active.stop()

    def lose_ranks(self, name: str, reason: str) -> None:
        """The ranks of the active run have gone, with the world."""
        if self.active is not None and not self.active.is_over:
            for rank in self.active.ranks:
                self.active.rank_died(rank, name, reason)

    async def save(self) -> None:
        """Have a checkpoint of the active run, where it saves any."""
        if self.active is not None:
            await self.active.save_before_end()

    async def save_run(self, run_id: str) -> int:
        """Have a checkpoint of this run; returns its step. Raises LLMCloudError."""
        if self.active is None or self.active.run_id != run_id:
            raise WorldError(f"run {run_id!r} has not begun: it waits for another one to end.")
        return await self.active.save()

    def leave(self) -> bool:
        """Let another agent go on with the active run at once; False when it has no restarts."""
        return self.active is not None and self.active.leave()

    def _after(self, cell: Execute, finish: Finish) -> None:
        is_everywhere = len(self._world.links) == len(cell.ranks or self._world.links)
        if finish.state == "finished" and is_everywhere:
            self._world.remember(cell)

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._waiting or run_id == self._beginning or self.is_active(run_id)

    def is_active(self, run_id: str) -> bool:
        """Whether this run is executed now."""
        return self.active is not None and self.active.run_id == run_id

    def stop(self, run_id: str) -> None:
        """Stop pressed for a run that is executed or queued here. Raises NotFound."""
        if self.active is not None and self.active.run_id == run_id:
            self.active.stop()
        elif run_id in self._waiting:
            self._waiting[run_id].cancel()
        elif run_id == self._beginning:
            self._is_stopped = True
        else:
            raise NotFound(f"run {run_id!r} has ended.")
