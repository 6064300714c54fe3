"""The life of a run, as rules: events in, instructions out, time as an argument.

A run ends when every rank has ended. Two things make ranks end early: a Stop, which climbs a ladder of four rungs, and
the failure of one rank, after which its peers must not wait for it in a collective.

    rung 1  consensus   all ranks raise KeyboardInterrupt after the same optimizer step; the group stays healthy
    rung 2  interrupt   SIGINT to every rank: Python code, data loading
    rung 3  release     blocked collectives are broken; namespaces are kept, the group is renewed before the next cell
    rung 4  kill        whoever still runs is killed and replaced
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from jupyter_llmcloud.core.tick import Tick


class Rung(IntEnum):
    """How hard a Stop presses: each rung is tried when ranks still run a while after the one before."""

    NONE = 0
    CONSENSUS = 1
    INTERRUPT = 2
    RELEASE = 3
    KILL = 4


@dataclass(frozen=True)
class Ladder:
    """Seconds until the next rung is reached when ranks still run.

    `release_s` counts from the interrupt, which comes at once in a cell without optimizer steps; the others count from
    the Stop, or from the first failure. A press within `again_s` of another one is the same one.
    """

    interrupt_s: float = 1.2
    release_s: float = 0.5
    kill_s: float = 6.5
    failure_release_s: float = 0.3
    again_s: float = 0.5


# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankEnded:
    """A rank finished the cell: well, with an error, or interrupted. `collateral`: the error is an echo of a peer's."""

    rank: int
    ename: str = ""
    evalue: str = ""
    collateral: bool = False
    interrupted: bool = False
    in_group: bool = True


@dataclass(frozen=True)
class RankDied:
    """The process of a rank has gone."""

    rank: int
    reason: str


@dataclass(frozen=True)
class StopPressed:
    """Somebody asked for a Stop; pressed again it goes to the next rung. A double click is one press."""


@dataclass(frozen=True)
class SaveAsked:
    """A checkpoint is wanted as soon as all ranks can save one of the same step."""


@dataclass(frozen=True)
class StepReported:
    """Steps a rank has finished when asked. A cell in which no rank has finished one is taken to have none."""

    rank: int
    step: int


Event = RankEnded | RankDied | StopPressed | SaveAsked | StepReported | Tick


# --- instructions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AskStep:
    """Pause at the next step boundary and report the step; `stops`: for a Stop, otherwise for a checkpoint."""

    ranks: tuple[int, ...]
    stops: bool = True


@dataclass(frozen=True)
class SaveAtStep:
    """The same step for all; -1: none, since they do not step, or are being let go."""

    ranks: tuple[int, ...]
    step: int


@dataclass(frozen=True)
class StopAtStep:
    """Interrupt each of these ranks when it has finished this many steps; -1: go on, forget the pause."""

    ranks: tuple[int, ...]
    step: int


@dataclass(frozen=True)
class InterruptRanks:
    """Raise KeyboardInterrupt in their main threads."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class ReleaseRanks:
    """Break their process group, so that a blocked collective raises an error."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class KillRanks:
    """Send SIGKILL to their processes."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Finish:
    """The run is over. `renew`: the group cannot be used again; `dead`: ranks to replace."""

    state: str
    culprit: int | None
    renew: bool
    dead: tuple[int, ...]


@dataclass(frozen=True)
class GoOnWithout:
    """A rank has died that the others do without: their plan waits for nobody."""

    rank: int
    reason: str


Instruction = GoOnWithout | AskStep | SaveAtStep | StopAtStep | InterruptRanks | ReleaseRanks | KillRanks | Finish


@dataclass
class _Rank:
    state: str = "running"  # done, failed, interrupted, died
    error: str = ""
    collateral: bool = False
    order: int = 0
    steps: int | None = None
    is_left_out: bool = False  # it has died, and the others have gone on


@dataclass
class _Counts:
    """Ranks that run, and those of them that have not said their step: an event must not cost a look at every rank."""

    running: int
    silent: int


@dataclass
class _Pressed:
    """When Stop was: the first time, and the last time that counted."""

    first: float = 0.0
    last: float = 0.0


@dataclass
class RunLifecycle:
    """One run. `handle` takes an event and the time in seconds and says what to do; `wake_at` when to send a Tick.

    `dispensable`: ranks without which the others go on; never all of them.
    """

    ranks: tuple[int, ...]
    ladder: Ladder = field(default_factory=Ladder)
    rung: Rung = Rung.NONE
    stop_requested: bool = False
    released: bool = False
    ended: bool = False
    wake_at: float | None = None
    dispensable: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self._ranks = {rank: _Rank() for rank in self.ranks}
        self._counts = _Counts(len(self.ranks), len(self.ranks))
        self._pressed = _Pressed()
        self._interrupted_at: float | None = None
        self._failed_at: float | None = None
        self._in_group = True
        self._saves_by: float | None = None  # until when ranks may say their steps, for a checkpoint

    @property
    def running(self) -> tuple[int, ...]:
        """Ranks that have not ended."""
        return tuple(rank for rank, item in self._ranks.items() if item.state == "running")

    @property
    def is_ending(self) -> bool:
        """A Stop was pressed or a rank has failed: the ranks are being let go."""
        return self.stop_requested or self._failed_at is not None

    @property
    def was_killed(self) -> bool:
        """Whether ranks that had not ended by themselves were killed, so that a death says nothing of its cause."""
        return self.rung == Rung.KILL

    def state_of(self, rank: int) -> str:
        """The state of a rank in this attempt."""
        return self._ranks[rank].state

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """What to do about `event`."""
        if self.ended:
            return []
        match event:
            case RankEnded():
                out = self._rank_ended(event, now)
            case RankDied():
                out = self._rank_died(event, now)
            case StopPressed():
                out = self._stop_pressed(now)
            case SaveAsked():
                out = self._save_asked(now)
            case StepReported():
                out = self._step_reported(event, now)
            case Tick():
                out = self._climb(now)
        if self._saves_by is not None and (self.is_ending or not self._counts.running or now >= self._saves_by):
            out = [*self._tell_save_at(-1), *out]
        if not self._counts.running:
            return [*out, self._finish()]
        due = self._next_rung()
        self.wake_at = due[1] if due is not None else self._saves_by
        return out

    # --- a checkpoint ---

    def _save_asked(self, now: float) -> list[Instruction]:
        if self.is_ending:
            return [SaveAtStep(self.running, -1)]
        self._saves_by = now + self.ladder.interrupt_s
        return [AskStep(self.running, stops=False)]

    def _tell_save_at(self, step: int) -> list[Instruction]:
        self._saves_by = None
        for item in self._ranks.values():
            item.steps = None
        self._counts.silent = self._counts.running
        return [SaveAtStep(self.running, step)]

    def _common_step(self) -> int | None:
        """The largest step that a rank has finished, once all that run have said theirs."""
        if self._counts.silent:
            return None
        return max((item.steps for item in self._ranks.values() if item.steps is not None), default=None)

    # --- ranks end ---

    def _rank_ended(self, event: RankEnded, now: float) -> list[Instruction]:
        item = self._ranks.get(event.rank)
        if item is None or item.state != "running":
            return []
        self._count_end(item)
        item.collateral = event.collateral
        self._in_group = self._in_group and event.in_group
        if event.interrupted and (self.stop_requested or self._failed_at is not None):
            item.state = "interrupted"
        elif event.ename:
            item.state, item.error = "failed", f"{event.ename}: {event.evalue}"
            self._note_failure(now)
        else:
            item.state = "done"
        return []

    def _rank_died(self, event: RankDied, now: float) -> list[Instruction]:
        item = self._ranks.get(event.rank)
        if item is None or item.state != "running":
            return []
        self._count_end(item)
        item.state, item.error = "died", event.reason
        item.collateral = self.was_killed  # by us, for what another rank has done
        if event.rank in self.dispensable and not self.is_ending:
            item.is_left_out = True
            return [GoOnWithout(event.rank, event.reason)]
        self._note_failure(now)
        self.released = True
        return [ReleaseRanks(self.running)] if self.running else []

    def _count_end(self, item: _Rank) -> None:
        """A rank that ran runs no more."""
        self._counts.running -= 1
        self._counts.silent -= item.steps is None
        item.order = len(self.ranks) - self._counts.running

    def _note_failure(self, now: float) -> None:
        if self._failed_at is None:
            self._failed_at = now

    # --- the ladder ---

    def _stop_pressed(self, now: float) -> list[Instruction]:
        if self.stop_requested and now - self._pressed.last < self.ladder.again_s:
            return []  # nobody has seen yet what the one before does
        self._pressed.last = now
        if not self.stop_requested:
            self.stop_requested = True
            self._pressed.first = now
            if self.rung >= Rung.INTERRUPT:  # a rank has failed, and the others are being let go
                return self._reach(Rung.INTERRUPT, now)
            self.rung = Rung.CONSENSUS
            return [AskStep(self.running)]
        return self._reach(Rung(min(self.rung + 1, Rung.KILL)), now)

    def _step_reported(self, event: StepReported, now: float) -> list[Instruction]:
        if event.rank not in self._ranks or not (self.rung == Rung.CONSENSUS or self._saves_by is not None):
            return []
        item = self._ranks[event.rank]
        self._counts.silent -= item.state == "running" and item.steps is None
        item.steps = event.step
        if (step := self._common_step()) is None:
            return []
        if self._saves_by is not None and not self.is_ending:
            return self._tell_save_at(step + 1 if step > 0 else -1)
        if step <= 0:
            return [StopAtStep(self.running, -1), *self._reach(Rung.INTERRUPT, now)]
        return [StopAtStep(self.running, step + 1)]

    def _climb(self, now: float) -> list[Instruction]:
        out: list[Instruction] = []
        while (due := self._next_rung()) is not None and now >= due[1]:
            out += self._reach(due[0], now)
        return out

    def _next_rung(self) -> tuple[Rung, float] | None:
        """The next rung and when it is due, while nothing changes."""
        if not self.is_ending:
            return None
        due: dict[Rung, float] = {}
        if self.stop_requested:
            due = {
                Rung.INTERRUPT: self._pressed.first + self.ladder.interrupt_s,
                Rung.KILL: self._pressed.first + self.ladder.kill_s,
            }
            if self._interrupted_at is not None:
                due[Rung.RELEASE] = self._interrupted_at + self.ladder.release_s
        if self._failed_at is not None and not (self.stop_requested and self._failed_at > self._pressed.first):
            # A peer of a failed rank is let out of its collective and interrupted at once; a Stop makes that no later.
            released_at = self._failed_at + self.ladder.failure_release_s
            due[Rung.RELEASE] = min(released_at, due.get(Rung.RELEASE, released_at))
            due[Rung.KILL] = self._failed_at + self.ladder.kill_s
            due.pop(Rung.INTERRUPT, None)  # a release is one, too
        return next((item for item in sorted(due.items()) if item[0] > self.rung), None)

    def _reach(self, rung: Rung, now: float) -> list[Instruction]:
        self.rung = max(self.rung, rung)
        running = self.running
        if not running:
            return []
        match rung:
            case Rung.INTERRUPT:
                self._interrupted_at = now
                return [InterruptRanks(running)]
            case Rung.RELEASE:
                self.released = True
                return [InterruptRanks(running), ReleaseRanks(self.ranks)]
            case Rung.KILL:
                return [KillRanks(running)]
        return []

    # --- the end ---

    def _finish(self) -> Finish:
        self.ended = True
        self.wake_at = None
        dead = tuple(rank for rank, item in self._ranks.items() if item.state == "died")
        failed = any(item.state in ("failed", "died") and not item.is_left_out for item in self._ranks.values())
        culprit = self._culprit() if failed or not self._has_left_out else None
        was_failing = (
            failed and self._failed_at is not None and self._failed_at < self._pressed.first
        )  # before Stop was pressed
        by_stop = self.rung >= Rung.INTERRUPT and not was_failing
        if self.stop_requested and (by_stop or not failed or self._only_interrupted()):
            state = "stopped"
        else:
            state = "failed" if failed else "finished"
        return Finish(state, culprit, self._must_renew(failed), dead)

    def _only_interrupted(self) -> bool:
        return all(item.state != "failed" or item.collateral for item in self._ranks.values())

    @property
    def _has_left_out(self) -> bool:
        return any(item.is_left_out for item in self._ranks.values())

    def _must_renew(self, failed: bool) -> bool:
        if self.released or self._has_left_out or not self._in_group or self.rung >= Rung.INTERRUPT:
            return True
        # The same error everywhere leaves the group in step; anything else may have left half a collective behind.
        errors = {item.error for item in self._ranks.values()}
        return failed and len(errors) > 1

    def _culprit(self) -> int | None:
        """The rank that failed first; a death or an error of its own counts before an echo of a peer's.

        Between the two is the death of a rank without which the others went on.
        """
        failed = [(rank, item) for rank, item in self._ranks.items() if item.state in ("failed", "died")]
        failed.sort(key=lambda pair: (pair[1].collateral, pair[1].is_left_out, pair[1].order))
        return failed[0][0] if failed else None
