"""The life of a sweep as rules: events in, instructions out.

A gang is a set of ranks on which one trial runs at a time. A trial whose ranks are lost is run once more, with the same
values; one that raises an error has failed and is not. When trials only fail, the sweep ends with the first error.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["done", "pruned", "failed", "unmeasured", "lost", "stopped"]
State = Literal["finished", "failed", "stopped"]
MAX_ATTEMPTS = 2  # of a trial whose ranks are lost
FAILURES_IN_A_ROW = 3  # from the first trial on: then none is expected to do better
MAX_LOST_GANGS = 5  # in a row, without any trial that has ended between


# --- events ---


@dataclass(frozen=True)
class GangReady:
    """Ranks of a gang wait for a trial."""

    gang: int


@dataclass(frozen=True)
class GangRefused:
    """No ranks can be had for a gang, now or later."""

    gang: int
    reason: str


@dataclass(frozen=True)
class TrialEnded:
    """A trial has ended: `lost` with its gang, `unmeasured` without the metric."""

    number: int
    kind: Kind
    reason: str = ""


@dataclass(frozen=True)
class Exhausted:
    """The sampler has nothing new to propose."""


@dataclass(frozen=True)
class SweepStopAsked:
    """Stop pressed."""


@dataclass(frozen=True)
class TimeOver:
    """The time that was given is over."""


Event = GangReady | GangRefused | TrialEnded | Exhausted | SweepStopAsked | TimeOver

# --- instructions ---


@dataclass(frozen=True)
class OpenGang:
    """Find ranks."""

    gang: int


@dataclass(frozen=True)
class CloseGang:
    """Give them back; of one that is not open yet, stop looking."""

    gang: int


@dataclass(frozen=True)
class StartTrial:
    """Run a trial on a gang; `attempt` counts from 0."""

    gang: int
    number: int
    attempt: int


@dataclass(frozen=True)
class StopTrial:
    """Stop a trial; asked again, harder."""

    number: int


@dataclass(frozen=True)
class SweepOver:
    """The sweep is over."""

    state: State
    reason: str


Instruction = OpenGang | CloseGang | StartTrial | StopTrial | SweepOver


class SweepRules:
    """Decides what is done next.

    Args:
        num_trials: that end, at most.
        parallel: gangs at the same time.
        num_ended: trials that have ended before, when a sweep goes on.
        num_measured: those of them that had the metric.
        first_number: of the next new trial.
        unfinished: trials that were under way when an earlier process of this sweep was killed.
        generation: trials that must all have ended before the next so many begin; 0 when none waits for others.
    """

    def __init__(
        self,
        num_trials: int,
        parallel: int,
        num_ended: int = 0,
        num_measured: int = 0,
        first_number: int = 0,
        unfinished: Iterable[int] = (),
        generation: int = 0,
    ) -> None:
        self._num_trials = num_trials
        self._parallel = parallel
        self._next_number = first_number
        self._waiting: list[int] = []  # gangs that are open, for the end of a generation
        self._again = deque(unfinished)
        self._counts: Counter[str] = Counter(ended=num_ended, measured=num_measured, generation=generation)
        self._attempts: Counter[int] = Counter()
        self._running: dict[int, int] = {}  # trials by gang
        self._gangs: set[int] = set()  # open, or being opened
        self._first_error = ""
        self._ending: SweepOver | None = None
        self._is_over = False

    @property
    def is_ending(self) -> bool:
        """Whether no trial is started any more."""
        return self._ending is not None

    def begin(self) -> list[Instruction]:
        """What is done first."""
        return self._finish_if_done() or [self._open() for _ in range(min(self._parallel, self._num_left))]

    def handle(self, event: Event) -> list[Instruction]:
        """What is done after an event."""
        match event:
            case GangReady(gang):
                return self._give_work(gang)
            case GangRefused(gang, reason):
                return self._refused(gang, reason)
            case TrialEnded():
                return self._trial_ended(event)
            case Exhausted():
                return self._end(SweepOver("finished", "every combination has been tried."))
            case SweepStopAsked():
                return self._end(SweepOver("stopped", ""), stops=True)
            case TimeOver():
                return self._end(SweepOver("finished", "its time is over."), stops=True)

    # --- trials ---

    @property
    def _num_left(self) -> int:
        """Trials that may be started yet, those that are run again among them."""
        return max(0, self._num_trials - self._counts["ended"] - len(self._running))

    def _open(self) -> OpenGang:
        gang = self._counts["gangs"]
        self._counts["gangs"] += 1
        self._gangs.add(gang)
        return OpenGang(gang)

    def _give_work(self, gang: int) -> list[Instruction]:
        if self.is_ending or not self._num_left:
            return [*self._close(gang), *self._finish_if_done()]
        if self._again:
            number = self._again.popleft()
        elif self._is_between_generations:
            self._waiting.append(gang)
            return []
        else:
            number, self._next_number = self._next_number, self._next_number + 1
        self._running[gang] = number
        return [StartTrial(gang, number, self._attempts[number])]

    @property
    def _is_between_generations(self) -> bool:
        """Whether the next new trial begins a generation, and trials of the one before are under way."""
        size = self._counts["generation"]
        return bool(size and self._running) and self._next_number % size == 0

    def _give_work_to_waiting(self) -> list[Instruction]:
        """A trial has ended, or is to be run again: who waits may have something to do."""
        waiting, self._waiting = self._waiting, []
        return [given for gang in waiting if gang in self._gangs for given in self._give_work(gang)]

    def _close(self, gang: int) -> list[Instruction]:
        self._gangs.discard(gang)
        return [CloseGang(gang)]

    def _refused(self, gang: int, reason: str) -> list[Instruction]:
        self._gangs.discard(gang)
        if self._gangs:
            return []  # the others go on without it
        self._ending = self._ending or SweepOver("failed", reason)
        return self._finish_if_done()

    def _trial_ended(self, event: TrialEnded) -> list[Instruction]:
        gang = next((gang for gang, number in self._running.items() if number == event.number), None)
        if gang is None:
            return []
        del self._running[gang]
        if event.kind == "lost":
            return self._lost(gang, event)
        self._counts["lost in a row"] = 0
        self._count(event)
        verdict = self._judge(event)
        given = self._give_work(gang) if gang in self._gangs else self._finish_if_done()
        return [*verdict, *given, *self._give_work_to_waiting()]

    def _lost(self, gang: int, event: TrialEnded) -> list[Instruction]:
        self._attempts[event.number] += 1
        self._counts["lost in a row"] += 1
        verdict: list[Instruction] = []
        if self.is_ending:
            pass
        elif self._attempts[event.number] < MAX_ATTEMPTS:
            self._again.append(event.number)
        else:
            self._count(event)
            verdict = self._judge(event)
        if self._counts["lost in a row"] >= MAX_LOST_GANGS:
            verdict = self._end(
                SweepOver("failed", f"its ranks were lost {MAX_LOST_GANGS} times in a row: {event.reason}")
            )
        closed = self._close(gang) if gang in self._gangs else []
        given = self._give_work_to_waiting()
        opened: list[Instruction] = [self._open()] if not self.is_ending and self._num_left > len(self._idle) else []
        return [*verdict, *closed, *given, *opened, *self._finish_if_done()]

    @property
    def _idle(self) -> set[int]:
        """Gangs without a trial, which will have one as soon as they are open."""
        return self._gangs - self._running.keys()

    def _count(self, event: TrialEnded) -> None:
        if event.kind == "stopped" and self.is_ending:
            return  # a sweep that goes on has it to do
        self._counts["ended"] += 1
        self._counts["measured"] += event.kind in ("done", "pruned")
        if event.kind in ("failed", "unmeasured", "lost"):
            self._counts["failures"] += 1
            self._first_error = self._first_error or event.reason

    def _judge(self, event: TrialEnded) -> list[Instruction]:
        """The end of a sweep of which nothing can come."""
        if self._counts["measured"] or self.is_ending:
            return []
        if event.kind == "unmeasured":
            return self._end(SweepOver("failed", event.reason), stops=True)
        if self._counts["failures"] >= FAILURES_IN_A_ROW:
            return self._end(SweepOver("failed", self._all_failed()), stops=True)
        return []

    def _all_failed(self) -> str:
        number = self._counts["failures"]
        first = f"the first {number} trials have failed" if number > 1 else "the trial has failed"
        return f"{first}. The first error: {self._first_error}"

    # --- the end ---

    def _end(self, end: SweepOver, stops: bool = False) -> list[Instruction]:
        is_first = self._ending is None
        self._ending = self._ending or end
        stopped: list[Instruction] = [StopTrial(number) for number in self._running.values()] if stops else []
        closed = [closing for gang in sorted(self._idle) for closing in self._close(gang)] if is_first else []
        return [*stopped, *closed, *self._finish_if_done()]

    def _finish_if_done(self) -> list[Instruction]:
        if self._running or self._is_over or (not self.is_ending and self._num_left):
            return []
        self._is_over = True
        self._ending = self._ending or SweepOver("finished", "")
        if self._ending.state == "finished" and self._counts["failures"] and not self._counts["measured"]:
            self._ending = SweepOver("failed", self._all_failed())
        closed = [closing for gang in sorted(self._gangs) for closing in self._close(gang)]
        return [*closed, self._ending]
