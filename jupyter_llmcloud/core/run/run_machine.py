"""The life of a run over all its attempts, as rules: events in, instructions out, time as an argument.

One attempt is a matter of core.lifecycle. What lies between two attempts is decided here: whether the run is executed
again, who leads it then, what it waits for, and how it ends.

    executing --AttemptFinished--> backing off --> finding capacity --> claiming --> healing --> looking --> executing
                    |                                 |      ^
                    v                                 v      |
                  ending                        waiting for capacity

A run is executed again only under a new claim to lead it: the agent of a rank that seems to be lost may stand by, and
lead in this one's place as soon as it has not heard this one for long enough. Those that are not lost stand by also in
the term of that claim, and where there are none, another one is asked at once: a restart may wait long for capacity.
Capacity is looked for before that claim, so that a run that finds none here can be led by an agent that has some. For
the same reason nobody tells the end of a run without a claim once another agent may lead it (`leads_until`).

At most one of FindCapacity, Heal and FindResumePoint is under way at a time, and at most one Claim; the result of each
comes back as an event, however late. Results that nobody waits for any more change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from jupyter_llmcloud.core.detect.rollback import Rollback
from jupyter_llmcloud.core.run.lifecycle import Finish
from jupyter_llmcloud.core.run.restarts import AttemptFailure, GiveUp, RestartPolicy, Retry
from jupyter_llmcloud.core.scheduling.elasticity import (
    Elasticity,
    LeaveOut,
    LeaveOutAsked,
    LookForRoom,
    NoMoreRoom,
    Pause,
    RoomFound,
    Save,
    Saved,
)
from jupyter_llmcloud.core.tick import Tick

CAPACITY_RETRY_S = 1.0
ROOM_FOR_MORE = "there is room for more ranks"
_CANNOT_SAVE = "no checkpoint could be saved with which others go on."
_LOST = Finish("lost", None, True, ())


class MachinePhase(Enum):
    """What a run does now."""

    NEW = "new"
    EXECUTING = "executing"
    BACKING_OFF = "backing off"
    FINDING_CAPACITY = "finding capacity"
    WAITING_FOR_CAPACITY = "waiting for capacity"
    CLAIMING = "claiming"
    HEALING = "healing"
    LOOKING = "looking for its resume point"
    ENDING = "ending"
    OVER = "over"


# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttemptStarted:
    """The first attempt has begun."""


@dataclass(frozen=True)
class TakenOver:
    """This agent has claimed to lead a run whose leader has gone.

    `was_stopping`: somebody had pressed Stop there. `was_announced`: it had been told to end, with its host.
    """

    was_stopping: bool = False
    was_announced: bool = False


@dataclass(frozen=True)
class AttemptFinished:
    """Every rank has ended, and the last checkpoint is written. `broken` says how, of an attempt that has failed."""

    finish: Finish
    broken: AttemptFailure | None = None


@dataclass(frozen=True)
class CapacityFound:
    """There are slots for the ranks that have lost their agent; none are needed when `slots` is empty."""

    slots: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class NoCapacity:
    """The cluster has no slots for them now."""

    reason: str


@dataclass(frozen=True)
class WorkerJoined:
    """A worker that knows the cluster holds this agent from now on."""


@dataclass(frozen=True)
class Claimed:
    """This agent leads in the next term, in which those stand by that are not lost."""


@dataclass(frozen=True)
class ClaimFailed:
    """Nobody can tell who leads, since the run's folder cannot be read or written."""

    reason: str


@dataclass(frozen=True)
class LeadLost:
    """Another agent has claimed to lead the run."""


@dataclass(frozen=True)
class StandbyLost:
    """The agent that stood by for this one is not heard any more."""


@dataclass(frozen=True)
class Healed:
    """Every rank has a process, and all have joined one process group; `size`: how many there are."""

    size: int = 0


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to be led back to."""

    folder: str
    step: int


@dataclass(frozen=True)
class ResumePointFound:
    """The newest complete checkpoint; None when there is none."""

    point: ResumePoint | None


@dataclass(frozen=True)
class RestartFailed:
    """Capacity, ranks or a checkpoint could not be had, for another reason than a lack of slots.

    `is_membership`: the world has lost more members meanwhile.
    """

    reason: str
    is_membership: bool = False


@dataclass(frozen=True)
class RollbackAsked:
    """A detector has found something for which the run is to go back to a checkpoint."""

    rollback: Rollback


@dataclass(frozen=True)
class StopAsked:
    """Somebody asked for a Stop."""


@dataclass(frozen=True)
class LeaveAsked:
    """This agent is told to end with its host or its place in a batch system (SIGTERM)."""


Event = (
    AttemptStarted
    | TakenOver
    | AttemptFinished
    | CapacityFound
    | NoCapacity
    | RoomFound
    | NoMoreRoom
    | Saved
    | WorkerJoined
    | Claimed
    | ClaimFailed
    | LeadLost
    | StandbyLost
    | Healed
    | ResumePointFound
    | RestartFailed
    | RollbackAsked
    | LeaveOutAsked
    | StopAsked
    | LeaveAsked
    | Tick
)


# --- instructions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FindCapacity:
    """Slots for the ranks that have lost their agent -> CapacityFound, NoCapacity, LeadLost, RestartFailed."""


@dataclass(frozen=True)
class Claim:
    """Lead in the next term -> Claimed, LeadLost, ClaimFailed. `to_end`: before anything else happens."""

    to_end: bool = False


@dataclass(frozen=True)
class Heal:
    """Replace the ranks that have died, on `slots` those whose agent has gone -> Healed, NoCapacity, RestartFailed."""

    slots: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class FindResumePoint:
    """-> ResumePointFound, RestartFailed. `before`: of so many steps at most, and later ones count no more."""

    before: int | None = None


@dataclass(frozen=True)
class Resume:
    """Execute the run again, the `number`-th time, from `point` or from its start.

    `left_out`: the first and the last step that change no weight from now on, of a run that was rolled back.
    """

    number: int
    point: ResumePoint | None
    note: str
    is_resize: bool = False
    is_rollback: bool = False
    left_out: tuple[int, int] | None = None


@dataclass(frozen=True)
class AppointStandby:
    """Have other agents stand by in the term that this one has claimed."""


@dataclass(frozen=True)
class StopAttempt:
    """Begin the ladder of a Stop, or go to its next rung."""


@dataclass(frozen=True)
class TimeOut:
    """The run has used the time that it was given: it is to be stopped."""


@dataclass(frozen=True)
class Note:
    """A word for who follows the run, and for its record."""

    text: str


@dataclass(frozen=True)
class HandOver:
    """Another agent leads the run: nothing more of it is written or told here.

    `to_standby`: none leads it yet, one of those that stand by is to begin as if this agent had been killed.
    """

    to_standby: bool = False


@dataclass(frozen=True)
class End:
    """The run is over."""

    finish: Finish


Instruction = (
    FindCapacity
    | LeaveOut
    | Claim
    | Heal
    | FindResumePoint
    | Resume
    | LookForRoom
    | Pause
    | Save
    | AppointStandby
    | StopAttempt
    | TimeOut
    | Note
    | HandOver
    | End
)


@dataclass
class _Restart:
    """The restart that is under way."""

    again: Retry
    why: str
    slots: Sequence[dict[str, Any]] = ()
    waits_for: str = ""


@dataclass
class RunMachine:
    """One run on the agent that leads it.

    `handle` takes an event and the time in seconds and says what to do; `wake_at` when to send a Tick.

    Args:
        policy: whether an attempt that broke is followed by another.
        deadline: when the run has used its time; None when it has no limit.
        elastic: of a run whose number of ranks may change.
    """

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    deadline: float | None = None
    elastic: Elasticity | None = None
    phase: MachinePhase = MachinePhase.NEW
    _due: float | None = None  # the end of a delay
    _restart: _Restart | None = None
    _finish: Finish = _LOST  # of the last attempt
    _is_stopping: bool = False
    _rollback: Rollback | None = None  # that is under way
    _leaves_out: LeaveOutAsked | None = None  # while the attempt is stopped for that
    is_claiming: bool = False  # a claim is under way
    _wants_standby: bool = False

    @property
    def is_over(self) -> bool:
        """Nothing is decided here any more."""
        return self.phase is MachinePhase.OVER

    @property
    def wake_at(self) -> float | None:
        """When the next Tick is due; None when none is."""
        if self.is_over:
            return None
        elastic_at = self.elastic.wake_at if self.elastic is not None else None
        return min((at for at in (self._due, self.deadline, elastic_at) if at is not None), default=None)

    @property
    def rank_left_out(self) -> int | None:
        """The rank whose host is to be left out, while the attempt is stopped for that."""
        return self._leaves_out.rank if self._leaves_out is not None else None

    def handle(self, event: Event, now: float, leads_until: float = math.inf) -> list[Instruction]:
        """What to do about `event`; no other agent leads the run before `leads_until`."""
        if self.is_over:
            return []
        match event:
            case LeadLost():
                return self._hand_over()
            case LeaveAsked():
                return self._hand_over(to_standby=True) if self.policy.max_restarts else []
            case StopAsked():
                return self._stop(now, leads_until)
            case RollbackAsked(rollback):
                return self._roll_back(rollback)
            case LeaveOutAsked():
                return [*self._leave_out(event)]
            case Claimed() | ClaimFailed() | StandbyLost():
                return self._leadership(event, now, leads_until)
            case Tick():
                return self._tick(now)
            case NoMoreRoom() if (asked := self._leaves_out) is not None:
                self._leaves_out = None
                return [Note(f"rank {asked.rank} stays: {_CANNOT_SAVE}"), *self._while_executing(event, now)]
            case RoomFound() | NoMoreRoom() | Saved():
                return [*self._while_executing(event, now)]
            case WorkerJoined() if self.phase is MachinePhase.EXECUTING:
                return [*self._while_executing(event, now)]
            case AttemptStarted() | TakenOver() | AttemptFinished():
                return self._attempt(event, now, leads_until)
            case _:
                return self._restarting(event, now, leads_until)

    # --- attempts ---

    def _attempt(
        self, event: AttemptStarted | TakenOver | AttemptFinished, now: float, until: float
    ) -> list[Instruction]:
        match event:
            case AttemptStarted() if self.phase is MachinePhase.NEW:
                self._executing(now)
            case TakenOver(True) if self.phase is MachinePhase.NEW:
                return self._end(replace(_LOST, state="stopped"), now, until)
            case TakenOver(False, was_announced) if self.phase is MachinePhase.NEW:
                lost = AttemptFailure("leader", is_membership=True, is_announced=was_announced)
                return self._with_standby(self._broken(lost, _LOST, now, until))
            case AttemptFinished(finish, broken) if self.phase is MachinePhase.EXECUTING:
                was_pausing = self.elastic is not None and self.elastic.end()
                asked, self._leaves_out = self._leaves_out, None
                if self._rollback is not None and not self._is_stopping:
                    self._finish = finish
                    self._restart = _Restart(self.policy.rolled_back(), self._rollback.why)
                    return self._find_capacity()
                if was_pausing and finish.state == "stopped" and not self._is_stopping:
                    self._finish = finish
                    self._restart = _Restart(self.policy.resized(), asked.why if asked else ROOM_FOR_MORE)
                    return [*([LeaveOut(asked.rank)] if asked else []), *self._find_capacity()]
                if broken is None or finish.state != "failed" or self._is_stopping:
                    return self._end(finish, now, until)
                return self._broken(broken, finish, now, until)
        return []

    def _roll_back(self, rollback: Rollback) -> list[Instruction]:
        """The attempt is stopped, however it ends by then, to be followed by one from an earlier checkpoint."""
        if self.phase is not MachinePhase.EXECUTING or self._is_stopping or self._rollback is not None:
            return []
        self._rollback = rollback
        return [StopAttempt()]

    def _leave_out(self, asked: LeaveOutAsked) -> Sequence[Instruction]:
        """The attempt is stopped after a checkpoint, to be followed by one on other hosts."""
        is_free = self.phase is MachinePhase.EXECUTING and not self._is_stopping and self._rollback is None
        if not is_free or self.elastic is None or self.elastic.is_pausing:
            return []
        self._leaves_out = asked
        return self.elastic.pause()

    def _broken(
        self, broken: AttemptFailure, finish: Finish, now: float, until: float, why: str = "", last_word: str = ""
    ) -> list[Instruction]:
        """Execute it again after a delay, or end it; `why` and `last_word` say it better than `broken` can."""
        self._finish = finish
        decision = self.policy.handle(broken)
        if isinstance(decision, GiveUp):
            refusal = last_word or decision.why
            notes: list[Instruction] = [Note(f"not executed again: {refusal}")] if refusal else []
            return [*notes, *self._end(finish, now, until)]
        self._restart = _Restart(decision, why or broken.message)
        if decision.delay_s:
            self.phase, self._due = MachinePhase.BACKING_OFF, now + decision.delay_s
            return []
        return self._find_capacity()

    def _executing(self, now: float) -> None:
        self.phase = MachinePhase.EXECUTING
        if self.elastic is not None:
            self.elastic.begin(now)

    def _while_executing(
        self, event: RoomFound | NoMoreRoom | Saved | WorkerJoined | Tick, now: float
    ) -> Sequence[Instruction]:
        if self.elastic is None or self.phase is not MachinePhase.EXECUTING or self._is_stopping:
            return []
        return self.elastic.worker_joined() if isinstance(event, WorkerJoined) else self.elastic.handle(event, now)

    # --- a restart, step by step ---

    def _restarting(self, event: Event, now: float, until: float) -> list[Instruction]:
        restart = self._restart
        if restart is None:
            return []
        match self.phase, event:
            case MachinePhase.FINDING_CAPACITY, CapacityFound(slots):
                restart.slots = slots
                return self._claim(MachinePhase.CLAIMING)
            case MachinePhase.FINDING_CAPACITY | MachinePhase.HEALING, NoCapacity(reason):
                return self._wait_for_capacity(restart, reason, now)
            case MachinePhase.WAITING_FOR_CAPACITY, WorkerJoined():
                return self._find_capacity()
            case MachinePhase.HEALING, Healed(size):
                self.phase = MachinePhase.LOOKING
                if self.elastic is not None:
                    self.elastic.size = size
                if restart.again.from_start:
                    return self._resume(restart, None, now)
                return [FindResumePoint(self._rollback.before if self._rollback is not None else None)]
            case MachinePhase.LOOKING, ResumePointFound(point):
                return self._resume(restart, point, now)
            case ((MachinePhase.FINDING_CAPACITY | MachinePhase.HEALING | MachinePhase.LOOKING), RestartFailed()):
                return self._restart_failed(event.reason, now, until, event.is_membership)
        return []

    def _find_capacity(self) -> list[Instruction]:
        self.phase, self._due = MachinePhase.FINDING_CAPACITY, None
        return [FindCapacity()]

    def _wait_for_capacity(self, restart: _Restart, reason: str, now: float) -> list[Instruction]:
        """Ask again in a while: no restart is used up meanwhile. The reason is told once."""
        self.phase, self._due = MachinePhase.WAITING_FOR_CAPACITY, now + CAPACITY_RETRY_S
        if restart.waits_for == reason:
            return []
        restart.waits_for = reason
        return [Note(f"{restart.why}; waits for capacity: {reason}")]

    def _heal(self, restart: _Restart) -> list[Instruction]:
        self.phase = MachinePhase.HEALING
        return [AppointStandby(), Heal(restart.slots)]

    def _resume(self, restart: _Restart, point: ResumePoint | None, now: float) -> list[Instruction]:
        self._restart = None
        self._executing(now)
        again = restart.again
        how = f"resumed from step {point.step}" if point is not None else "executed again from its start"
        if self.elastic is not None:
            how += f" on {self.elastic.size} rank{'s' if self.elastic.size != 1 else ''}"
        is_counted = not (again.is_resize or again.is_rollback)
        counted = f" (restart {self.policy.num_restarts} of {self.policy.max_restarts})" if is_counted else ""
        rollback, self._rollback = self._rollback, None
        left_out = rollback.left_out(point.step if point is not None else None) if rollback is not None else None
        if left_out is not None:
            counted += f"; steps {left_out[0]} to {left_out[1]} are left out"
        note = f"{restart.why}; {how}{counted}"
        return [  # in this order: before anything is executed on another host, they know that they must wait for that
            AppointStandby(),
            Resume(again.number, point, note, again.is_resize, again.is_rollback, left_out),
        ]

    def _restart_failed(self, reason: str, now: float, until: float, is_membership: bool = False) -> list[Instruction]:
        """It counts as an attempt that broke at once."""
        failed = replace(_LOST, state="failed")
        why = f"the ranks could not be replaced: {reason.rstrip('.')}"
        broken = AttemptFailure("death", step=-1, is_membership=is_membership)
        return self._broken(broken, failed, now, until, why, last_word=reason)

    # --- who leads ---

    def _claim(self, phase: MachinePhase) -> list[Instruction]:
        """One claim serves everything that waits for one."""
        self.phase = phase
        if self.is_claiming:
            return []
        self.is_claiming = True
        return [Claim(to_end=phase is MachinePhase.ENDING)]

    def _leadership(self, event: Event, now: float, until: float) -> list[Instruction]:
        match event:
            case StandbyLost():  # it may still live, and lead when it has not heard this agent for long enough
                self._wants_standby = True
                return self._claim(self.phase)
            case Claimed():
                self.is_claiming = False
                return self._claimed()
            case ClaimFailed(reason):
                self.is_claiming = False
                if self.phase is MachinePhase.CLAIMING and not self._wants_standby:
                    return self._restart_failed(reason, now, until)
        return self._hand_over()  # who cannot see the run's folder cannot know that it still leads

    def _claimed(self) -> list[Instruction]:
        self._wants_standby = False
        if self.phase is MachinePhase.ENDING:
            return self._over(End(self._finish))
        if self.phase is MachinePhase.CLAIMING and self._restart is not None:
            return self._heal(self._restart)
        return [AppointStandby()]

    def _with_standby(self, instructions: list[Instruction]) -> list[Instruction]:
        return instructions if self.is_over else [AppointStandby(), *instructions]

    def _hand_over(self, *, to_standby: bool = False) -> list[Instruction]:
        return self._over(HandOver(to_standby))

    # --- time, and the end ---

    def _tick(self, now: float) -> list[Instruction]:
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            return [TimeOut()]
        if self._due is not None and now >= self._due:
            return self._find_capacity()
        return [*self._while_executing(Tick(), now)]

    def _stop(self, now: float, until: float) -> list[Instruction]:
        self._is_stopping = True
        if self.phase in (MachinePhase.NEW, MachinePhase.EXECUTING):
            return [StopAttempt()]
        if self.phase is MachinePhase.ENDING:
            return []
        return self._end(replace(self._finish, state="stopped", culprit=None, renew=False, dead=()), now, until)

    def _end(self, finish: Finish, now: float, until: float) -> list[Instruction]:
        self._finish, self._restart, self._due = finish, None, None
        return self._over(End(finish)) if now < until else self._claim(MachinePhase.ENDING)

    def _over(self, last: End | HandOver) -> list[Instruction]:
        self.phase, self._restart, self._due = MachinePhase.OVER, None, None
        return [last]
