"""A run that is being executed: its folder, its journals, those who follow it, and the rules that end it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.agent.runs.checkpoint_committer import RunCheckpoints
from jupyter_llmcloud.agent.runs.hang_monitor import HangWatch
from jupyter_llmcloud.agent.runs.writer import RunFiles
from jupyter_llmcloud.core.run import lifecycle
from jupyter_llmcloud.core.run.end_report import report
from jupyter_llmcloud.core.run.lifecycle import (
    Instruction,
    RankDied,
    RankEnded,
    RunLifecycle,
    StepReported,
    StopPressed,
    Tick,
)
from jupyter_llmcloud.core.run.restarts import Again, Broken, GiveUp, RestartPolicy
from jupyter_llmcloud.protocol.agent_messages import Execute, Journaled, RankState, RunEnded
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Message, replace
from jupyter_llmcloud.protocol.rank_messages import (
    CellEnded,
    CheckpointPart,
    Heartbeat,
    Interrupt,
    Measured,
    Printed,
    RankLooked,
    Release,
    StepAsked,
    StepTold,
    StopAt,
)
from jupyter_llmcloud.storage.checkpoints import Checkpoint
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

if TYPE_CHECKING:
    from jupyter_llmcloud.agent.ranks.local_rank import RankLink

RECORD_AFTER_S = 0.05


class RunSupervisor:
    """Carries out what the lifecycle decides.

    Args:
        cell: what is executed; `ranks` is complete.
        links: how to reach each of its ranks.
        record: its first `run.json`.
    """

    def __init__(self, cell: Execute, links: dict[int, RankLink], record: RunRecord, folder: RunFolder) -> None:
        self.cell = cell
        self.record = record
        self.folder = folder
        self.followers: set[Connection] = set()
        self.ended: asyncio.Future[lifecycle.Finish] = asyncio.get_running_loop().create_future()
        self.attempt: asyncio.Future[lifecycle.Finish] = asyncio.get_running_loop().create_future()
        self.again: Again | None = None  # decided, not begun yet
        self.leads: Callable[[bool], bool] = lambda to_the_end: True  # with restarts another agent may have begun to
        self.checkpoints = RunCheckpoints(folder.path, cell.ranks, cell.keep_checkpoints, self._note)
        self._restarts = RestartPolicy(cell.max_restarts, record.num_restarts)
        self._why = ""
        self._timed_out = ""
        self._why_waiting = ""
        self._is_ours = True
        self._sweeping: asyncio.Task[None] | None = None
        self._links = links
        self._rules = RunLifecycle(tuple(cell.ranks))
        self._files = RunFiles(folder, record, cell.source or cell.code, self._note)
        self._errors: dict[int, dict[str, Any]] = {}
        self._payload = b""
        self._timer: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None
        self._hangs = self._watch()

    def _watch(self) -> HangWatch:
        return HangWatch(
            self.cell,
            self._links,
            lambda rank, record: self.journal("logs", rank, [record]),
            lambda: self._rules.is_ending,
        )

    # --- beginning ---

    def make_folder(self) -> None:
        """Raises OSError."""
        self.folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def begin(self) -> None:
        """Send the cell to its ranks.

        The record is written with the first output or a moment later: a short quiet cell has ended by then and its
        record is written once.
        """
        self._send(self.cell.ranks, self.cell)
        self._change("running")
        self._late = asyncio.get_running_loop().call_later(RECORD_AFTER_S, self._tell_begun)
        if self.cell.background or self.cell.max_restarts:  # others look for it there
            self._tell_begun()
        self._hangs.begin()
        self._begin_timeout()

    def _begin_timeout(self) -> None:
        left_s = max(0.0, self.record.created + self.cell.timeout_s - time.time())
        if self.cell.timeout_s:
            asyncio.get_running_loop().call_later(left_s, self._time_out)

    def _tell_begun(self) -> None:
        if self._late is None:
            return
        self._late.cancel()
        self._late = None
        self._files.create()
        for rank in self.cell.ranks:
            if self._rules.state_of(rank) == "running":
                self.tell(RankState(run_id=self.record.run_id, rank=rank, state="running"))

    def lead_on(self) -> None:
        """Go on with a run whose leader has gone, if it has restarts left and nobody has pressed Stop."""
        lost = lifecycle.Finish("lost", None, True, ())
        decision = GiveUp() if self.record.state == "stopping" else self.break_again(Broken("leader"))
        self.attempt.set_result(lost)
        if isinstance(decision, Again):
            self.again = decision
            self._begin_timeout()
            self._write_record()  # with its new leader
            return
        if decision.why:
            self._note(f"not executed again: {decision.why}")
        self._end(lost if decision.why else lifecycle.Finish("stopped", None, True, ()))

    def hand_over(self) -> None:
        """Another agent leads the run: nothing more of it is written or told here."""
        self._hangs.close()
        self._is_ours = False
        for follower in self.followers:
            follower.close()  # it finds the run again where it is
        self.again = None
        if not self.ended.done():
            self.ended.set_result(lifecycle.Finish("lost", None, True, ()))
        if not self.attempt.done():
            self.attempt.set_result(self.ended.result())

    def _is_led_here(self, to_the_end: bool = False) -> bool:
        if self._is_ours and not self.leads(to_the_end):
            self.hand_over()
        return self._is_ours

    @property
    def has_ended(self) -> bool:
        """Whether its end is told in its record."""
        return self.ended.done() and self._is_ours

    def wait_for_room(self, reason: str) -> None:
        """It cannot be executed again now; said once."""
        if self._why_waiting != reason:
            self._why_waiting = reason
            self._note(f"{self._why}; waits for room: {reason}")

    def begin_again(self, checkpoint: Checkpoint | None, notes: list[str]) -> None:
        """Send the cell once more, with the checkpoint that it is to be led back to."""
        assert self.again is not None
        again, self.again = self.again, None
        self.attempt = asyncio.get_running_loop().create_future()
        resume = {"folder": str(checkpoint.path), "step": checkpoint.step} if checkpoint else {}
        self.cell = replace(self.cell, attempt=again.number, resume=resume)
        self.record.num_restarts = again.number
        self._why_waiting = ""
        self.checkpoints.new_attempt(again.number)
        self._rules = RunLifecycle(tuple(self.cell.ranks))
        self._errors.clear()
        self._payload = b""
        self._hangs = self._watch()
        where = f"resumed from step {checkpoint.step}" if checkpoint else "executed again from its start"
        for note in [*notes, f"{self._why}; {where} (restart {again.number} of {self.cell.max_restarts})"]:
            self._note(note)
        for rank in self.cell.ranks:
            self._links[rank].send(self.cell)
            self.tell(RankState(run_id=self.record.run_id, rank=rank, state="running"))
        self._write_record()
        self._hangs.begin()

    def _note(self, text: str) -> None:
        """A word for who follows the run, and for its record."""
        self.record.history.append({"t": round(time.time(), 3), "why": text})
        self.tell(RankState(run_id=self.record.run_id, rank=-1, state="note", detail=text))

    def _time_out(self) -> None:
        if not self.ended.done():
            self._timed_out = f"--timeout: {self.cell.timeout_s:g} s have passed"
            self.record.history.append({"t": time.time(), "why": self._timed_out})
            self.stop()

    def _change(self, state: str) -> None:
        self.record.state = state
        self.record.history.append({"t": round(time.time(), 3), "state": state})

    # --- what happens to it ---

    def stop(self) -> None:
        """Stop pressed, by whomever."""
        if self.record.state == "running":
            self._change("stopping")
            self._write_record()
        if self.again is not None:
            self._end(lifecycle.Finish("stopped", None, False, ()))
        else:
            self._handle(StopPressed())

    def on_message(self, rank: int, message: Message) -> None:
        """A rank says something."""
        if not self._is_led_here():
            return
        match message:
            case Printed():
                self.journal("logs", rank, message.records)
            case Measured():
                self.journal("metrics", rank, message.records)
            case Heartbeat():
                self._hangs.heard(rank, message)
            case RankLooked():
                self._hangs.looked(rank, message)
            case CheckpointPart() if message.run_id == self.record.run_id:
                self.checkpoints.part(rank, message)
            case StepTold():
                self._handle(StepReported(rank, message.step))
            case CellEnded() if message.run_id == self.record.run_id:
                self._rank_ended(rank, message)

    def _rank_ended(self, rank: int, message: CellEnded) -> None:
        self._hangs.ended(rank, message.groups)
        self._links[rank].drain()
        self._payload = message.payload or self._payload
        self.record.artifacts.update(message.artifacts)
        error = message.error or {}
        if error:
            self._errors[rank] = {"rank": rank, **error}
        self._handle(
            RankEnded(
                rank,
                ename=error.get("ename", ""),
                evalue=error.get("evalue", ""),
                collateral=bool(error.get("collateral")),
                interrupted=message.interrupted,
                in_group=message.in_group,
            )
        )

    def rank_died(self, rank: int, name: str, reason: str) -> None:
        """The process of one of its ranks has gone."""
        self._errors[rank] = {"rank": rank, "ename": name, "evalue": reason, "traceback": [f"{name}: {reason}"]}
        self._handle(RankDied(rank, reason))

    def journal(self, kind: str, rank: int, records: list[dict[str, Any]]) -> None:
        """Write records of a rank, then ring at the followers."""
        self._tell_begun()
        written = self._files.append(kind, rank, records)
        self.tell(Journaled(run_id=self.record.run_id, rank=rank, journal=kind, records=written))

    def _write_record(self) -> None:
        if self._late is not None:
            self._tell_begun()
        else:
            self._files.write_record()

    def tell(self, message: Message, *, hurry: bool = True) -> None:
        """Send to everybody who follows this run."""
        for follower in list(self.followers):
            follower.send(message, hurry=hurry)
            if follower.closed:
                self.followers.discard(follower)

    # --- carrying out ---

    def _handle(self, event: lifecycle.Event) -> None:
        loop = asyncio.get_running_loop()
        before = {rank: self._rules.state_of(rank) for rank in self.cell.ranks}
        instructions = self._rules.handle(event, loop.time())
        for rank, state in before.items():
            if (now := self._rules.state_of(rank)) != state:
                detail = self._errors.get(rank, {}).get("ename", "")
                self.tell(RankState(run_id=self.record.run_id, rank=rank, state=now, detail=detail), hurry=False)
        for instruction in instructions:
            self._carry_out(instruction)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._rules.wake_at is not None:
            self._timer = loop.call_at(self._rules.wake_at, self._handle, Tick())

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case lifecycle.AskStep(ranks):
                self._send(ranks, StepAsked())
            case lifecycle.TellStopAt(ranks, step):
                self._send(ranks, StopAt(step=step))
            case lifecycle.InterruptRanks(ranks):
                self._send(ranks, Interrupt())
            case lifecycle.ReleaseRanks(ranks):
                self._send(ranks, Release())
            case lifecycle.KillRanks(ranks):
                for rank in ranks:
                    self._links[rank].kill()
            case lifecycle.Finish():
                self._finish(instruction)

    def _send(self, ranks: Iterable[int], message: Message) -> None:
        for rank in ranks:
            self._links[rank].send(message)

    def _finish(self, finish: lifecycle.Finish) -> None:
        self._hangs.close()
        for rank in self.cell.ranks:
            self._links[rank].drain()
        if (commit := self.checkpoints.busy) is not None:
            commit.add_done_callback(lambda _: self._conclude(finish))
        else:
            self._conclude(finish)

    def _conclude(self, finish: lifecycle.Finish) -> None:
        """An attempt is over: the run is too, unless it is executed again."""
        if not self._is_led_here():
            return
        decision = self._decide(finish)
        if isinstance(decision, Again):
            self.again = decision
        else:
            if decision.why:
                self._note(f"not executed again: {decision.why}")
            self._end(finish)
        self.attempt.set_result(finish)

    def _decide(self, finish: lifecycle.Finish) -> Again | GiveUp:
        if finish.state != "failed" or finish.culprit is None or self.record.state == "stopping":
            return GiveUp()
        error = self._errors.get(finish.culprit, {})
        died = self._rules.state_of(finish.culprit) == "died"
        broken = Broken(
            "death" if died else "echo" if error.get("collateral") else "error",
            finish.culprit,
            error.get("ename", ""),
            max((other.get("step", 0) for other in self._errors.values()), default=0),
            bool(error.get("replaying")),
        )
        return self.break_again(broken)

    def break_again(self, broken: Broken) -> Again | GiveUp:
        """What the policy says of an attempt that broke; a restart that fails is one, too."""
        self._why = broken.words
        return self._restarts.handle(broken)

    def cannot_restart(self, error: Exception) -> None:
        """The world could not be healed: the next restart tries again, or the run has failed."""
        decision = self.break_again(Broken("death", step=-1))
        if isinstance(decision, Again):
            self.again = decision
            return
        self._note(f"not executed again: {error}")
        self._end(lifecycle.Finish("failed", None, True, ()))

    def _end(self, finish: lifecycle.Finish) -> None:
        if self.ended.done() or not self._is_led_here(to_the_end=True):
            return
        self._change(finish.state)
        self.record.ended = time.time()
        self.record.errors = sorted(self._errors.values(), key=lambda it: (it["rank"] != finish.culprit, it["rank"]))
        self._write_record()
        self.tell(
            RunEnded(
                run_id=self.record.run_id,
                state=finish.state,
                errors=self.record.errors,
                report=self._report(finish),
                artifacts=self.record.artifacts,
                payload=self._payload,
            )
        )
        self._files.close()
        self.again = None
        if (self.folder.path / "checkpoints").is_dir():
            self._sweeping = asyncio.ensure_future(self.checkpoints.sweep())
        self.ended.set_result(finish)

    def _report(self, finish: lifecycle.Finish) -> list[str]:
        states = {rank: self._rules.state_of(rank) for rank in self.cell.ranks}
        lines = report(states, self._errors, finish.culprit, self._rules.stop_requested)
        return [f"{self._timed_out}.", *lines] if self._timed_out else lines
