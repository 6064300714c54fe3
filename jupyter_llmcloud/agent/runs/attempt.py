"""One attempt of a run: a cell on its ranks, and the rules that end it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jupyter_llmcloud.agent.ranks.local_rank import RankLink
from jupyter_llmcloud.agent.runs.hang_monitor import HangMonitor
from jupyter_llmcloud.agent.runs.run_feed import RunFeed
from jupyter_llmcloud.core.parallel import plan
from jupyter_llmcloud.core.run import lifecycle
from jupyter_llmcloud.core.run.end_report import report
from jupyter_llmcloud.core.run.exits import KILLED_BY_US, LOST_WITH_AGENT
from jupyter_llmcloud.core.run.lifecycle import (
    Finish,
    Instruction,
    RankDied,
    RankEnded,
    RunLifecycle,
    SaveAsked,
    StepReported,
    StopPressed,
)
from jupyter_llmcloud.core.run.restarts import AttemptFailure, kind_of
from jupyter_llmcloud.core.tick import Tick
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rank_messages import (
    CellEnded,
    Heartbeat,
    Interrupt,
    RankProbed,
    Release,
    SaveAt,
    SaveLastState,
    StepQuery,
    StepReply,
    StopAt,
)


class Attempt:
    """Carries out what core.lifecycle decides.

    Args:
        cell: what is executed; `ranks` is complete.
        links: how to reach each of its ranks.
        on_finish: called when every rank has ended.

    Attributes:
        payload: what was pulled.
    """

    def __init__(
        self, cell: Execute, links: Mapping[int, RankLink], feed: RunFeed, on_finish: Callable[[Finish], None]
    ) -> None:
        self.cell = cell
        self.ranks = cell.ranks
        self.timeout_s = cell.timeout_s
        self.payload = b""
        self._links = links
        self._feed = feed
        self._on_finish = on_finish
        may_restart = bool(cell.max_restarts or cell.elastic)
        dispensable = plan.dispensable(cell.plan, cell.ranks, may_restart)
        self._rules = RunLifecycle(tuple(cell.ranks), dispensable=dispensable)
        self._errors: dict[int, dict[str, Any]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._saving: asyncio.Future[int] | None = None
        self._hangs: HangMonitor | None = None  # once it has begun

    def begin(self) -> None:
        """Send the cell to its ranks."""
        self._send(self.ranks, self.cell)  # first: the ranks work while the rest is made ready for what they say
        self._feed.begin_attempt(self.cell.attempt, self.ranks)
        self._hangs = HangMonitor(
            self.cell,
            self._links,
            lambda rank, record: self._feed.journal("logs", rank, [record]),
            lambda: self._rules.is_ending,
        )
        self._hangs.begin()

    @property
    def running(self) -> tuple[int, ...]:
        """Ranks that have not ended."""
        return self._rules.running

    def close(self) -> None:
        """Watch its ranks no more."""
        if self._hangs is not None:
            self._hangs.close()

    # --- what happens to it ---

    def stop(self) -> None:
        """Begin the ladder of a Stop, or go to its next rung."""
        self._handle(StopPressed())

    async def save(self) -> int:
        """Ask for a checkpoint of the next step that all ranks can save; returns that step, -1 when there is none."""
        if self._hangs is None or not self.running:
            return -1
        if self._saving is None:
            self._saving = asyncio.get_running_loop().create_future()
            self._handle(SaveAsked())
        return await asyncio.shield(self._saving)

    def _has_saved(self, step: int) -> None:
        saving, self._saving = self._saving, None
        if saving is not None and not saving.done():
            saving.set_result(step)

    def on_message(self, rank: int, message: Message) -> None:
        """A rank says something."""
        if self._hangs is None:
            return
        match message:
            case Heartbeat():
                self._hangs.heard(rank, message)
                if message.run_id == self.cell.run_id:
                    self._feed.spent(rank, message.times)
                    self._feed.memory(rank, (message.rss, message.available), message.device_memory)
            case RankProbed():
                self._hangs.looked(rank, message)
            case StepReply():
                self._handle(StepReported(rank, message.step))
            case CellEnded() if message.run_id == self.cell.run_id:
                self._hangs.ended(rank, message.groups)
                self._feed.spent(rank, message.times, is_last=True)
                self._rank_ended(rank, message)

    def _rank_ended(self, rank: int, message: CellEnded) -> None:
        self.payload = message.payload or self.payload
        self._feed.record.artifacts.update(message.artifacts)
        error = message.error or {}
        if error:
            how = {"interrupted": True} if message.interrupted else {}
            self._errors[rank] = {"rank": rank, **error, **how}
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
        by_us = self._rules.was_killed and name == "RankKilled"
        reason = KILLED_BY_US if by_us else reason
        error = {"rank": rank, "ename": name, "evalue": reason, "traceback": [f"{name}: {reason}"]}
        self._errors[rank] = {**error, "collateral": True} if by_us else error
        if self._hangs is not None:
            if self.cell.elastic and name == LOST_WITH_AGENT:
                left = [other for other in self.running if other != rank]
                self._send(left, SaveLastState(left=left))
            self._handle(RankDied(rank, reason))

    def how_died(self, rank: int) -> tuple[str, str]:
        """The name and the reason of what `rank_died` was told last of a rank."""
        error = self._errors.get(rank, {})
        return error.get("ename", "RankExited"), error.get("evalue", "the process has ended before its cell began.")

    # --- carrying out ---

    def _handle(self, event: lifecycle.Event) -> None:
        loop = asyncio.get_running_loop()
        ends = [event.rank] if isinstance(event, RankEnded | RankDied) else []  # no other event changes a rank's state
        before = {rank: self._rules.state_of(rank) for rank in ends}
        instructions = self._rules.handle(event, loop.time())
        for rank, state in before.items():
            if (now := self._rules.state_of(rank)) != state:
                self._feed.tell_state(rank, now, self._errors.get(rank, {}).get("ename", ""), hurry=False)
        for instruction in instructions:
            self._carry_out(instruction)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._rules.wake_at is not None:
            self._timer = loop.call_at(self._rules.wake_at, self._handle, Tick())

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case lifecycle.GoOnWithout(rank, reason):
                self._go_on_without(rank, reason)
            case lifecycle.AskStep(ranks, stops):
                self._send(ranks, StepQuery(stops=stops))
            case lifecycle.SaveAtStep(ranks, step):
                self._send(ranks, SaveAt(step=step))
                self._has_saved(step)
            case lifecycle.StopAtStep(ranks, step):
                self._send(ranks, StopAt(step=step))
            case lifecycle.InterruptRanks(ranks):
                self._send(ranks, Interrupt())
            case lifecycle.ReleaseRanks(ranks):
                self._send(ranks, Release())
            case lifecycle.KillRanks(ranks):
                for rank in ranks:
                    self._links[rank].kill()
            case lifecycle.Finish():
                self.close()
                for rank in self.ranks:
                    self._links[rank].drain()
                self._on_finish(instruction)

    def _go_on_without(self, rank: int, reason: str) -> None:
        if self._hangs is not None:
            self._hangs.ended(rank, {})
        self._feed.left(rank)
        said = (
            f"rank {rank} is lost: {reason}. The others go on without it. Its steps since its last round are lost; on "
            "the rows of these, and on those that were still before it, the others train at the end of the pass, where "
            "accelerator.prepare() or lc.data.load() has made the loader."
        )
        self._feed.note(said)
        self._feed.mark("alert", None, said)

    def is_without(self, rank: int) -> bool:
        """Whether it goes on although this rank has died."""
        return not self._rules.is_ending and self._rules.state_of(rank) == "died"

    def _send(self, ranks: Iterable[int], message: Message) -> None:
        for rank in ranks:
            self._links[rank].send(message)

    # --- its end ---

    def broken(self, finish: Finish) -> AttemptFailure | None:
        """How it has failed; None when it has not."""
        if finish.state != "failed" or finish.culprit is None:
            return None
        error = self._errors.get(finish.culprit, {})
        died = self._rules.state_of(finish.culprit) == "died"
        return AttemptFailure(
            kind_of(died, bool(error.get("collateral")), error.get("evalue", "")),
            finish.culprit,
            error.get("ename", ""),
            max((other.get("step", 0) for other in self._errors.values()), default=0),
            bool(error.get("replaying")),
            str(error.get("evalue", "")),
        )

    def errors(self, culprit: int | None) -> list[dict[str, Any]]:
        """Those of its ranks, the culprit's first."""
        return sorted(self._errors.values(), key=lambda error: (error["rank"] != culprit, error["rank"]))

    def report(self, culprit: int | None) -> list[str]:
        """A line for each kind of end that ranks had."""
        states = {rank: self._rules.state_of(rank) for rank in self.ranks}
        return report(states, self._errors, culprit, self._rules.stop_requested)
