"""The runs of a world: one at a time, in the order they come, executed again as often as they may be."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.agent.failover.run_leadership import RunLeadership
from jupyter_llmcloud.agent.runs.supervisor import RunSupervisor
from jupyter_llmcloud.core.run.lifecycle import Finish
from jupyter_llmcloud.errors import Busy, LLMCloudError, NotFound, WorldError
from jupyter_llmcloud.protocol.agent_messages import Execute, RankState, RunEnded
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import replace
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

if TYPE_CHECKING:
    from jupyter_llmcloud.agent.world.world import World

ROOM_AGAIN_S = 1.0


class RunQueue:
    """Those that are queued, and the active one.

    Attributes:
        active: the run that is executed now.
        turn: held by whoever uses the ranks.
    """

    def __init__(self, world: World) -> None:
        self.active: RunSupervisor | None = None
        self.queued: list[str] = []
        self.turn = asyncio.Lock()
        self._world = world
        self._waiting: dict[str, asyncio.Future[Any]] = {}  # turns, by run
        self._lead: RunLeadership | None = None  # of a run with restarts

    @property
    def until(self) -> float | None:
        """Until when no other agent leads the active run (seconds of the loop's clock); None: nobody stands by."""
        return self._lead.until if self._lead is not None else None

    async def execute(self, cell: Execute, connection: Connection | None) -> None:
        """Execute a cell when it is its turn; `connection` follows it."""
        if not await self._take_turn(cell, connection):
            self._never_began(cell, connection, "stopped")
            return
        try:
            await self._world.heal()
            await self._execute(cell, connection)
        except LLMCloudError as error:
            if connection is None or RunFolder(Path(cell.folder)).exists:  # nobody to refuse it to, or it has waited
                self._never_began(cell, None, "failed", error)
            if connection is not None:
                raise
        finally:
            self.active = None
            self._world.idle_since = time.monotonic()
            self.turn.release()

    async def _take_turn(self, cell: Execute, connection: Connection | None) -> bool:
        """Wait until no other run is under way; False when the run was stopped meanwhile."""
        if not self.turn.locked() and not self._waiting:
            return await self.turn.acquire()
        run_id = cell.run_id
        with contextlib.suppress(OSError):  # so that it is known to have waited, should this agent be lost
            RunFolder(Path(cell.folder)).create(self._record(cell), cell.source or cell.code)
        if connection is not None:
            ahead = (
                f"for {self.active.record.run_id} to end" if self.active else "until the ranks have answered a request"
            )
            connection.send(RankState(run_id=run_id, rank=-1, state="queued", detail=f"waits {ahead}"))
        self.queued.append(run_id)
        turn = self._waiting[run_id] = asyncio.ensure_future(self.turn.acquire())
        try:
            await asyncio.wait([turn])
        finally:
            turn.cancel()  # no effect when it has come
            self.queued.remove(run_id)
            del self._waiting[run_id]
        return not turn.cancelled()

    def _never_began(
        self, cell: Execute, connection: Connection | None, state: str, error: Exception | None = None
    ) -> None:
        """The end of a run that was stopped in the queue, or found no ranks."""
        record = self._record(cell)
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

    def _record(self, cell: Execute) -> RunRecord:
        return RunRecord(
            run_id=cell.run_id,
            name=cell.name,
            created=time.time(),
            ranks=cell.ranks or list(range(self._world.world_size)),
            world_size=self._world.world_size,
            world_id=self._world.world_id,
            cluster=cell.cluster,
            agent=cell.agent or self._world.agent.address,
            owner=cell.owner,
            spec=cell.spec,
            script=cell.script,
        )

    async def _execute(self, cell: Execute, connection: Connection | None) -> None:
        self._world.cells[cell.filename] = cell.execution_count
        record = self._record(cell)
        folder = RunFolder(Path(cell.folder))
        self.active = RunSupervisor(replace(cell, ranks=record.ranks, number=0), self._world.links, record, folder)
        if connection is not None:
            self.active.followers.add(connection)
        try:
            self.active.make_folder()
            if cell.max_restarts:
                await self._begin_lead(self.active)
        except OSError as error:
            raise WorldError(f"the run's folder cannot be made: {error.strerror}: {cell.folder}.") from None
        self.active.begin()
        for note in self._world.notes:
            self.active.tell(RankState(run_id=cell.run_id, rank=-1, state="note", detail=note))
        self._world.notes.clear()
        await self._see_through(self.active)
        self._after(cell, self.active.ended.result())
        self._give_up_what_is_led_elsewhere(self.active)

    async def lead_on(self, cell: Execute, definitions: list[Execute], record: RunRecord, term: int) -> None:
        """See a run through whose leader has gone: this world has no ranks yet."""
        self._world.world_size = record.world_size
        self._world.definitions.cells = definitions
        self._world.cells |= {known.filename: known.execution_count for known in (*definitions, cell)}
        folder = RunFolder(Path(cell.folder))
        async with self.turn:
            self.active = RunSupervisor(replace(cell, ranks=record.ranks), self._world.links, record, folder)
            self._lead = self._make_lead(folder, term)
            try:
                self.active.leads = self._leads
                self.active.lead_on()
                await self._see_through(self.active)
                self._give_up_what_is_led_elsewhere(self.active)
            finally:
                self.active = None
                self._world.idle_since = time.monotonic()
        if not self._world.links and not self._world.closed:
            self._world.agent.end_world(self._world.world_id)  # its ranks could not be started

    async def _begin_lead(self, run: RunSupervisor) -> None:
        lead = self._make_lead(run.folder)
        await lead.begin(run.cell, self._world.definitions.cells, self._world.shares.num_threads)
        lead.stand_by(self._world.shares.followers)
        self._lead = lead
        run.leads = self._leads

    def _make_lead(self, folder: RunFolder, term: int = -1) -> RunLeadership:
        return RunLeadership(
            self._world.agent,
            self._world.spec,
            folder,
            on_change=self._world.shares.live_until,
            on_loss=self._lost_lead,
            term=term,
        )

    def _leads(self, to_the_end: bool) -> bool:
        return self._lead is None or self._lead.leads(to_the_end)

    def _lost_lead(self) -> None:
        if self.active is not None:
            self.active.hand_over()

    def leave(self) -> bool:
        """Let another agent go on with the active run at once; False when it has no restarts."""
        if self._lead is None or self.active is None:
            return False
        self._lead.leave()
        self._lead = None
        self.active.hand_over()
        return True

    def _give_up_what_is_led_elsewhere(self, run: RunSupervisor) -> None:
        """Nothing that belongs to the run may go on here."""
        if not run.has_ended and not self._world.closed:
            self._world.agent.end_world(self._world.world_id)

    async def _see_through(self, run: RunSupervisor) -> None:
        """Wait for the end of a run; as long as it may be executed again, heal the world and do so."""
        try:
            await self._execute_again(run)
        finally:
            if self._lead is not None:
                self._lead.end()
                if run.has_ended:
                    self._lead.forget()
                self._lead = None

    async def _execute_again(self, run: RunSupervisor) -> None:
        finish = await run.attempt
        claimed, room = None, []
        while (again := run.again) is not None:
            self._world.must_renew |= finish.renew
            await asyncio.wait([run.ended], timeout=again.delay_s)
            try:
                if self._lead is not None and claimed is not again:
                    if self._lead.is_over:
                        run.hand_over()
                        break
                    room = await self._world.find_room()  # else let another agent lead it that has some
                    if not await self._lead.claim():
                        run.hand_over()
                        break
                claimed = again
                await self._world.heal(room)
                checkpoint = None if again.from_start else await run.checkpoints.newest()
            except Busy as busy:
                run.wait_for_room(str(busy))
                await asyncio.wait([run.ended], timeout=ROOM_AGAIN_S)
                continue
            except (LLMCloudError, OSError) as error:
                if run.again is not None:
                    run.cannot_restart(error)
                continue
            if run.again is None:
                break  # stopped meanwhile
            run.begin_again(checkpoint, self._world.notes)
            self._world.notes.clear()
            if self._lead is not None:
                self._lead.stand_by(self._world.shares.followers)
            finish = await run.attempt
        await run.ended

    def _after(self, cell: Execute, finish: Finish) -> None:
        self._world.must_renew |= finish.renew
        if (
            cell.is_definition
            and finish.state == "finished"
            and len(self._world.links) == len(cell.ranks or self._world.links)
        ):
            self._world.definitions.cells.append(cell)

    def __contains__(self, run_id: str) -> bool:
        return run_id in self.queued or (self.active is not None and self.active.record.run_id == run_id)

    def stop(self, run_id: str) -> None:
        """Stop pressed for a run that is executed or queued here. Raises NotFound."""
        if self.active is not None and self.active.record.run_id == run_id:
            self.active.stop()
        elif run_id in self._waiting:
            self._waiting[run_id].cancel()
        else:
            raise NotFound(f"run {run_id!r} has ended.")
