"""A run on its leading agent, over all its attempts: carries out what core.run.run_machine decides."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from jupyter_llmcloud.agent.failover.follower_link import FollowerLink
from jupyter_llmcloud.agent.failover.run_leadership import RunLeadership
from jupyter_llmcloud.agent.ranks.local_rank import RankLink
from jupyter_llmcloud.agent.runs.alert_log import AlertActions
from jupyter_llmcloud.agent.runs.attempt import Attempt
from jupyter_llmcloud.agent.runs.checkpoint_committer import CheckpointCommitter
from jupyter_llmcloud.agent.runs.run_feed import RunFeed
from jupyter_llmcloud.config import price_per_hour
from jupyter_llmcloud.core.detect.rollback import Rollback
from jupyter_llmcloud.core.run import run_machine
from jupyter_llmcloud.core.run.end_report import describe_cost, read_price
from jupyter_llmcloud.core.run.lifecycle import Finish
from jupyter_llmcloud.core.run.restarts import AttemptFailure, RestartPolicy
from jupyter_llmcloud.core.run.run_machine import (
    AttemptFinished,
    AttemptStarted,
    CapacityFound,
    Claimed,
    ClaimFailed,
    Event,
    Healed,
    Instruction,
    LeadLost,
    LeaveAsked,
    NoCapacity,
    RestartFailed,
    ResumePoint,
    ResumePointFound,
    RollbackAsked,
    RunMachine,
    StandbyLost,
    StopAsked,
    TakenOver,
    WorkerJoined,
)
from jupyter_llmcloud.core.scheduling import elasticity
from jupyter_llmcloud.core.scheduling.elasticity import (
    Elasticity,
    LeaveOutAsked,
    NoMoreRoom,
    RoomFound,
    Saved,
    SizeBounds,
)
from jupyter_llmcloud.core.tick import Tick
from jupyter_llmcloud.errors import Busy, ConnectionLost, LLMCloudError, UsageError, WorldError
from jupyter_llmcloud.protocol.agent_messages import Execute, Replayed, RunEnded
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Message, replace
from jupyter_llmcloud.protocol.rank_messages import CheckpointPart, LogRecords, MetricRecords
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

_ELSEWHERE = Finish("lost", None, True, ())


class Restartable(Protocol):
    """The world of a run: the ranks that execute it, and how to have them all again."""

    @property
    def links(self) -> dict[int, RankLink]:
        """How to reach each rank."""

    @property
    def followers(self) -> Sequence[FollowerLink]:
        """The links to the other agents that host ranks."""

    def needs_renewal(self, must_renew: bool) -> None:
        """An attempt has ended; whether it left the process group in a state that cannot be used."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    @property
    def dead(self) -> Sequence[int]:
        """Ranks whose process has gone."""

    @property
    def has_lost_members(self) -> bool:
        """Whether ranks have gone with their agent."""

    @property
    def was_announced(self) -> bool:
        """Whether those that have gone were taken away with their host, as it was announced."""

    def without_host_of(self, rank: int) -> int:
        """How many ranks there are beside those of the agent that hosts this one."""

    def leave_out(self, rank: int) -> str:
        """Go on without the agent that hosts this rank, which gets none again; its key, "" when there is none."""

    async def find_capacity(self, bounds: SizeBounds | None = None) -> list[dict[str, Any]]:
        """Slots for the ranks whose agent has gone; within bounds, as many as there are. Raises Busy."""

    async def heal(
        self, slots: Sequence[dict[str, Any]] = (), coming: Execute | None = None, bounds: SizeBounds | None = None
    ) -> None:
        """Replace ranks that have died, or go on without and with more; renew the group. Raises LLMCloudError."""

    def take_notes(self) -> list[str]:
        """What became of ranks."""


class RunSupervisor:
    """One run.

    Args:
        cell: what is executed; `ranks` is complete.
        record: its first `run.json`.
        make_lead: makes the leadership of a run with restarts, given what to call when its standby is lost.

    Attributes:
        ended: done when the run is over here.
        is_recorded: whether its end is told in its record; else it is led elsewhere.
    """

    def __init__(
        self,
        cell: Execute,
        record: RunRecord,
        folder: RunFolder,
        world: Restartable,
        make_lead: Callable[[Callable[[], None]], RunLeadership],
    ) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(0.0, record.created + cell.timeout_s - time.time()) if cell.timeout_s else None
        self.ended: asyncio.Future[Finish] = loop.create_future()
        self.is_recorded = False
        self.record = record
        if record.left_out:  # of an earlier leader; else of a run that it resumes
            cell = replace(cell, left_out=record.left_out)
        record.left_out = cell.left_out
        record.price = float(cell.spec.get("price") or read_price(price_per_hour())[0])
        actions = AlertActions(self.stop, self._roll_back, self._leave_out)
        self._feed = RunFeed(record, folder, cell.source or cell.code, lambda: self._attempt.running, actions)
        self._lead = make_lead(lambda: self._handle(StandbyLost())) if cell.max_restarts else None
        self._world = world
        self._checkpoints = CheckpointCommitter(folder.path, cell.ranks, cell.keep_checkpoints, self._feed)
        policy = RestartPolicy(cell.max_restarts, record.num_restarts, record.num_resizes, bool(cell.elastic))
        policy.num_rollbacks = record.num_rollbacks
        bounds = SizeBounds.of(cell.elastic)
        elastic = Elasticity(bounds.most, world.size, not cell.checkpoint_every) if bounds is not None else None
        self._machine = RunMachine(policy, deadline, elastic)
        self._attempt = self._make_attempt(cell)
        self._timed_out = ""
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def _make_attempt(self, cell: Execute) -> Attempt:
        return Attempt(cell, self._world.links, self._feed, self._on_finish)

    @property
    def _bounds(self) -> SizeBounds | None:
        return SizeBounds.of(self._attempt.cell.elastic)

    @property
    def num_wanted(self) -> int:
        """Ranks that it could have besides its own; 0 of a run that is not elastic."""
        bounds = self._bounds
        return max(0, bounds.most - self._world.size) if bounds is not None else 0

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or is led elsewhere."""
        return self.ended.done()

    @property
    def run_id(self) -> str:
        """Of this run."""
        return self.record.run_id

    @property
    def ranks(self) -> list[int]:
        """Those that execute it."""
        return self._attempt.ranks

    @property
    def until(self) -> float | None:
        """Until when no other agent leads it (seconds of the loop's clock); None: nobody stands by."""
        return self._lead.until if self._lead is not None else None

    async def claim_first(self, definitions: list[Replayed], num_threads: Mapping[int, int]) -> None:
        """Lead a run with restarts from here, and write down what another agent needs for that. Raises OSError."""
        if self._lead is not None:
            await self._lead.begin(self._attempt.cell, definitions, num_threads)

    def follow(self, connection: Connection) -> None:
        """Tell this connection what happens from now on."""
        self._feed.follow(connection)

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        self._feed.forget(connection)

    async def settled(self) -> None:
        """Wait until nothing that was begun for the run is under way any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- what happens to it ---

    def begin(self) -> None:
        """Send the cell to its ranks."""
        cell = self._attempt.cell
        if self._lead is not None:
            self._lead.standby(self._world.followers)
        self._handle(AttemptStarted())
        is_read = "__file__" in cell.code  # which is in the folder
        self._feed.begin(at_once=is_read or cell.background or bool(cell.max_restarts))
        self._begin_attempt(self._attempt)
        for note in self._world.take_notes():
            self._feed.tell_state(-1, "note", note)

    def note_resize(self, before: int, now: int) -> None:
        """Its world had so many ranks in the run before."""
        self._feed.mark("resize", 0, f"the world was resized from {before} to {now} ranks")

    def take_over(self) -> None:
        """Go on with a run whose leader has gone, if it has restarts left and nobody has pressed Stop."""
        if self._the_lead.is_over:  # whoever pressed Stop meanwhile has ended the run: its record says so
            self._handle(LeadLost())
            return
        self._feed.write_record()  # with its new leader
        self._the_lead.note_here()
        self._handle(TakenOver(self.record.state == "stopping", self._the_lead.was_left))

    def stop(self) -> None:
        """Stop pressed, by whomever."""
        if self.record.state == "running":
            self._feed.change("stopping")
            self._feed.write_record()
        self._handle(StopAsked())

    def _roll_back(self, rollback: Rollback) -> None:
        """A detector has found something for which the run is to go back."""
        self._handle(RollbackAsked(rollback))

    def _leave_out(self, rank: int, why: str) -> str:
        """Have a slow rank left out, with its host; returns why it is not, "" when it is."""
        bounds, staying = self._bounds, self._world.without_host_of(rank)
        if bounds is None:
            return "the run is not elastic"
        if staying < bounds.least:
            remain = f"{staying} rank{'s' if staying != 1 else ''} would remain without its host"
            return f"{remain}, and --elastic wants {bounds.least}"
        self._handle(LeaveOutAsked(rank, why))
        return "" if self._machine.rank_left_out == rank else "the run ends or changes its ranks now"

    def _world_without(self, agent: str) -> None:
        """Another leader is to leave it out, too: that is written before anything else is done."""
        if agent:
            self.record.agents_left_out.append(agent)
            self._feed.write_record()

    async def save_before_end(self) -> None:
        """Have a checkpoint of the present step, where the run saves any: this agent is about to end."""
        if self._saves and (step := await self._save()) >= 0:
            said = f"the node agent was told to end: a checkpoint of step {step} was saved."
            self._feed.note(said)
            self._feed.mark("alert", step, said)

    async def save(self) -> int:
        """Have a checkpoint of the next step that all ranks share; returns the step. Raises UsageError, WorldError."""
        if not self._saves:
            raise UsageError(
                f"run {self.run_id!r} saves no checkpoints. It does when it is started with --checkpoint-every or"
                " --max-restarts."
            )
        if (step := await self._save()) < 0:
            raise WorldError(
                f"no checkpoint of run {self.run_id!r} was saved: it has no optimizer step now at which all ranks could"
                " save one, or it has ended."
            )
        return step

    @property
    def _saves(self) -> bool:
        cell = self._attempt.cell
        return bool(cell.checkpoint_every or cell.max_restarts or cell.resume)

    async def _save(self) -> int:
        """The step that was saved; -1 for none."""
        if self.is_over:
            return -1
        saved = asyncio.ensure_future(self._saved())
        either: list[asyncio.Future[Any]] = [saved, self.ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return -1 if saved.cancel() or self.is_over else saved.result()

    async def _saved(self) -> int:
        step = await self._attempt.save()
        return await self._checkpoints.until_settled(step) if step >= 0 else -1

    def announce_end(self) -> None:
        """The host will be taken away, perhaps before anybody else could lead the run."""
        if self._lead is not None and not self.is_over:
            self._lead.announce_end()

    def leave(self) -> bool:
        """This agent is told to end; returns whether another one goes on with the run."""
        self._handle(LeaveAsked())
        return self.ended.done() and not self.is_recorded

    def worker_joined(self) -> None:
        """A worker that knows the cluster holds this agent from now on."""
        self._handle(WorkerJoined())

    def on_message(self, rank: int, message: Message) -> None:
        """A rank says something."""
        if not self._is_led_here():
            return
        match message:
            case LogRecords():
                self._feed.journal("logs", rank, message.records)
            case MetricRecords():
                self._feed.journal("metrics", rank, message.records)
            case CheckpointPart() if message.run_id == self.run_id:
                self._checkpoints.part(rank, message)
            case _:
                self._attempt.on_message(rank, message)

    def rank_died(self, rank: int, name: str, reason: str) -> None:
        """The process of one of its ranks has gone."""
        self._attempt.rank_died(rank, name, reason)
        if not self.is_over and self._attempt.is_without(rank):
            self._checkpoints.without(rank)

    def _is_led_here(self) -> bool:
        """Nothing is written or told of a run that another agent leads."""
        if self._lead is not None and not self._machine.is_claiming and self._lead.is_lost:
            self._handle(LeadLost())
        return self.is_recorded or not self.ended.done()

    def _on_finish(self, finish: Finish) -> None:
        """Every rank has ended: the last checkpoint is written before anything is decided."""
        if (commit := self._checkpoints.busy) is not None:
            commit.add_done_callback(lambda _: self._attempt_finished(finish))
        else:
            self._attempt_finished(finish)

    def _attempt_finished(self, finish: Finish) -> None:
        if self._is_led_here():
            self._world.needs_renewal(finish.renew)
            broken = self._attempt.broken(finish)
            if broken is not None and broken.kind != "error" and self._world.has_lost_members:
                broken = dataclasses.replace(broken, is_membership=True, is_announced=self._world.was_announced)
            elif broken is not None and (bounds := self._bounds) is not None:
                broken = self._needing_more_ranks(broken, bounds)
            self._handle(AttemptFinished(finish, broken))

    def _needing_more_ranks(self, broken: AttemptFailure, bounds: SizeBounds) -> AttemptFailure:
        """Of an elastic run that has too little memory on so few ranks: it waits until there are more."""
        cell, size = self._attempt.cell, self._world.size
        if not broken.is_too_large_for(size, cell.reference_ranks):
            return broken
        self._feed.note(
            f"the memory of {size} rank{'s' if size > 1 else ''} is too small for the batch of "
            f"{cell.reference_ranks}: it goes on when there are more."
        )
        self._attempt.cell = replace(cell, elastic=bounds.above(size))
        return dataclasses.replace(broken, is_membership=True)

    # --- carrying out ---

    def _handle(self, event: Event) -> None:
        loop = asyncio.get_running_loop()
        until = math.inf if self.until is None else self.until
        for instruction in self._machine.handle(event, loop.time(), until):
            self._carry_out(instruction)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (at := self._machine.wake_at) is not None:
            self._timer = loop.call_at(at, self._handle, Tick())

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case run_machine.FindCapacity():
                self._do(self._find_capacity())
            case run_machine.Claim(to_end=True):
                self._claim_now()
            case run_machine.Claim():
                self._do(self._claim())
            case run_machine.Heal(slots):
                self._do(self._heal(slots))
            case run_machine.FindResumePoint(before):
                self._do(self._find_resume_point(before))
            case run_machine.Resume():
                self._resume(instruction)
            case elasticity.LeaveOut(rank):
                self._world_without(self._world.leave_out(rank))
            case elasticity.LookForRoom():
                self._do(self._look_for_room())
            case elasticity.Pause():
                self._do(self._pause())
            case elasticity.Save():
                self._do(self._save_now())
            case run_machine.AppointStandby():
                self._the_lead.standby(self._world.followers)
            case run_machine.StopAttempt():
                self._attempt.stop()
            case run_machine.TimeOut():
                self._time_out()
            case run_machine.Note(text):
                self._feed.note(text)
            case run_machine.HandOver(to_standby):
                self._hand_over(to_standby)
            case run_machine.End(finish):
                self._end(finish)

    @property
    def _the_lead(self) -> RunLeadership:
        assert self._lead is not None, "only a run with restarts is executed again"
        return self._lead

    def _do(self, work: Awaitable[Event]) -> None:
        task = asyncio.ensure_future(self._answer(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, work: Awaitable[Event]) -> None:
        """What comes of `work` is the next event, whatever it is, unless another agent has begun to lead meanwhile."""
        event = await self._event(work)
        if self._lead is not None:
            await self._lead.settled()
            event = LeadLost() if self._lead.is_lost else event
        self._handle(event)

    async def _event(self, work: Awaitable[Event]) -> Event:
        try:
            return await work
        except Busy as busy:
            return NoCapacity(str(busy))
        except (LLMCloudError, OSError) as error:
            has_lost_members = self._world.has_lost_members
            if self._bounds is not None and isinstance(error, ConnectionLost) and not has_lost_members:
                return NoCapacity(str(error))  # its slots were of an agent that was about to go, which is no fault
            return RestartFailed(str(error), has_lost_members)
        except Exception as error:  # a run must not wait for ever for something that nobody foresaw
            traceback.print_exc(file=sys.stderr)
            return RestartFailed(f"the node agent failed: {error!r}")

    async def _find_capacity(self) -> Event:
        await self._the_lead.settled()  # a claim of our own is not another's
        if self._the_lead.is_over:
            return LeadLost()
        return CapacityFound(await self._world.find_capacity(self._bounds))

    async def _look_for_room(self) -> Event:
        assert self._bounds is not None
        with contextlib.suppress(LLMCloudError):
            await self._world.find_capacity(SizeBounds(self._world.size + 1, self._bounds.most))
            return RoomFound()
        return NoMoreRoom()

    async def _pause(self) -> Event:
        """Stop the attempt after a checkpoint; what comes of that is told when its ranks have ended."""
        attempt = self._attempt
        if await self._save() < 0:
            return NoMoreRoom()
        if attempt is self._attempt and not self.is_over:
            attempt.stop()
        return Saved(0.0)

    async def _save_now(self) -> Event:
        await self._save()
        return Saved(self._checkpoints.cost_s)

    async def _claim(self) -> Event:
        try:
            return Claimed() if await self._the_lead.claim() else LeadLost()
        except OSError as error:
            return ClaimFailed(str(error))

    def _claim_now(self) -> None:
        try:
            event: Event = Claimed() if self._the_lead.claim_now() else LeadLost()
        except OSError as error:
            event = ClaimFailed(str(error))
        self._handle(event)

    async def _heal(self, slots: Sequence[dict[str, Any]]) -> Event:
        await self._world.heal(slots, self._attempt.cell, self._bounds)
        return Healed(self._world.size)

    async def _find_resume_point(self, before: int | None) -> Event:
        found = await self._checkpoints.newest(before)
        return ResumePointFound(ResumePoint(str(found.path), found.step) if found is not None else None)

    def _resume(self, resume: run_machine.Resume) -> None:
        """Send the cell once more, with the checkpoint that it is to be led back to."""
        point = {"folder": resume.point.folder, "step": resume.point.step} if resume.point is not None else {}
        cell = self._attempt.cell
        if self._bounds is not None:
            cell = replace(cell, ranks=list(range(self._world.size)))
            self.record.ranks, self.record.world_size = cell.ranks, self._world.size
        if resume.left_out is not None:
            cell = replace(cell, left_out=[*cell.left_out, list(resume.left_out)])
            self.record.left_out = cell.left_out
        before, self._attempt = self._attempt, self._make_attempt(replace(cell, attempt=resume.number, resume=point))
        self._count(resume)
        self._checkpoints.new_attempt(resume.number, cell.ranks)
        for note in [*self._world.take_notes(), resume.note]:
            self._feed.note(note)
        kind = "resize" if resume.is_resize else "restart"
        self._feed.mark(kind, resume.point.step if resume.point is not None else None, resume.note)
        for rank in self.ranks:
            self._feed.tell_state(rank, "running")
        self._begin_attempt(before)
        self._feed.write_record()

    def _begin_attempt(self, told: Attempt) -> None:
        """Send the cell; `told` has heard of the ranks that have died since all of them had met."""
        attempt = self._attempt
        attempt.begin()
        for rank in set(self._world.dead) & set(attempt.ranks):  # nobody says so once more
            attempt.rank_died(rank, *told.how_died(rank))

    def _count(self, resume: run_machine.Resume) -> None:
        self.record.num_resizes += resume.is_resize
        self.record.num_rollbacks += resume.is_rollback
        self.record.num_restarts += not (resume.is_resize or resume.is_rollback)

    def _time_out(self) -> None:
        self._timed_out = f"--timeout: {self._attempt.timeout_s:g} s have passed"
        self._feed.remember(self._timed_out)
        self.stop()

    # --- the end ---

    def _hand_over(self, to_standby: bool) -> None:
        """Another agent leads the run: nothing more of it is written or told here."""
        self._attempt.close()
        self._feed.cut_off()
        self.ended.set_result(_ELSEWHERE)
        if to_standby:
            self._the_lead.leave()
        else:
            self._the_lead.end()

    def _end(self, finish: Finish) -> None:
        record = self.record
        self._feed.change(finish.state)
        record.ended, record.errors = time.time(), self._attempt.errors(finish.culprit)
        seconds = self._feed.seconds
        record.seconds = {str(rank): parts for rank, parts in seconds.items()}
        report = [*self._feed.diagnose(), *self._attempt.report(finish.culprit)]
        if finish.state == "finished":
            self._feed.note_saved()
        spent = sum(sum(parts.values()) for parts in seconds.values())
        if cost := describe_cost(record.price, spent) or read_price(price_per_hour())[1]:
            self._feed.note(cost)
        self._feed.write_record()
        self._feed.tell(
            RunEnded(
                run_id=self.run_id,
                state=finish.state,
                errors=record.errors,
                report=[f"{self._timed_out}.", *report] if self._timed_out else report,
                artifacts=record.artifacts,
                payload=self._attempt.payload,
                seconds=seconds,
            )
        )
        self._feed.close()
        self._checkpoints.end()
        if self._lead is not None:
            self._lead.end()
            self._lead.forget()
        self.is_recorded = True
        self._feed.flush()  # first: whoever waits for the end works while the rest is put in order
        self.ended.set_result(finish)
