"""When is a rank late? What each rank's side thread saw goes in, a report comes out; time is an argument.

Nobody is late while nobody waits: slow evaluation, a checkpoint or data loading on all ranks alike is never a hang. A
rank is late when others are blocked in a collective that it has not entered, for longer than

    max(floor, 5 x p99 of how long such waits have lasted: in that phase of the late rank, at that place of the waiting)

where the floor is ten seconds, and a minute for a rank that visibly works on data, a checkpoint or an evaluation (what
one rank does alone while the others wait for it). A rank whose side thread is silent is looked at from outside: one
that is stopped is late by itself. When nobody is left to wait for, the ranks wait for each other: a deadlock.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from jupyter_llmcloud.core.names import format_ranks

FLOOR_S = 10.0
FACTOR = 5.0
PATIENT = ("data", "checkpoint", "evaluation")  # phases in which one rank may well work alone
PATIENCE = 6.0  # times the floor, for a rank that visibly works in one of them
REMEMBERED = 200  # waits, per phase and place
IN_TRAINING = ("the gradient all_reduce", "DDP's exchange")  # so begin waits for another rank's next batch
OUT_OF_DATA = (
    " With unlike numbers of batches on the ranks, train in `with model.join():` of DistributedDataParallel, or give "
    "each rank as many."
)
STOPS = " The run is stopped (--watch hang=stop)."
ADVICE = re.compile(r" (?:Press Stop to interrupt(?:, or wait)?|The run is stopped \(--watch hang=stop\))\.")
SILENT_HEARTBEATS = 2.5  # heartbeats missed until a rank counts as silent


def heartbeat_s(floor_s: float) -> float:
    """How often a rank says something when nothing changes."""
    return min(2.0, floor_s / 5)


@dataclass(frozen=True)
class GroupState:
    """A process group as one of its ranks sees it: collectives begun and finished."""

    ranks: tuple[int, ...]
    begun: int
    finished: int


@dataclass(frozen=True)
class Sample:
    """What the side thread of a rank saw.

    Attributes:
        phase: data, compute, collective, checkpoint, evaluation or unknown.
        op: the collective that the main thread is in; "" when it is in none.
        place, doing: the innermost notebook line, and what it is doing there.
        still_s: seconds since the main thread moved.
        working: it moves, or its process uses the processor.
    """

    phase: str = "unknown"
    op: str = ""
    groups: Mapping[str, GroupState] = field(default_factory=dict)
    step: int = 0
    place: str = ""
    doing: str = ""
    still_s: float = 0.0
    working: bool = False


@dataclass(frozen=True)
class ProcessSample:
    """What is seen of a process from outside: its state as in /proc, and the processor time it has used."""

    state: str
    cpu_s: float
    busy: bool = False


@dataclass(frozen=True)
class HangReport:
    """To be shown. `late` and `waiting` are ranks; `recovered`: the report before is over.

    `lasts_s`: how long the longest wait has lasted, `limit_s`: beyond which it is none that is usual.
    """

    text: str
    late: tuple[int, ...]
    waiting: tuple[int, ...] = ()
    recovered: bool = False
    lasts_s: float = 0.0
    limit_s: float = 0.0


@dataclass
class _RankStatus:
    sample: Sample = field(default_factory=Sample)
    heard_at: float = 0.0
    phase_since: float = 0.0
    ended: bool = False
    look: ProcessSample | None = None


@dataclass(frozen=True)
class _Wait:
    """A rank is blocked in a collective: of which group, its number (0: cannot be told), since when, for whom."""

    rank: int
    group: str
    number: int
    op: str
    place: str
    lasts_s: float
    missing: frozenset[int]

    @property
    def title(self) -> str:
        return f"{self.op} #{self.number}" if self.number else self.op


@dataclass(frozen=True)
class _Late:
    """How long a late rank has been waited for, and how long that may last."""

    lasts_s: float
    limit_s: float


_Key = tuple[str, str]  # phase of the late rank ("" for all of the wait), place of the waiting one


@dataclass
class _Episode:
    """A wait that goes on: how long it has lasted by key, and whether that should become normal."""

    lasted: dict[_Key, float] = field(default_factory=dict)
    teaches: bool = True


@dataclass
class HangRule:
    """One run. Feed it with `heard`, `looked` and `ended`; ask `check` about once a second.

    Args:
        ranks: that take part in the run.
        world_size: of the world, whose groups may have other members.
        began: when the run began.
    """

    ranks: tuple[int, ...]
    world_size: int
    began: float
    floor_s: float = FLOOR_S

    def __post_init__(self) -> None:
        self._ranks = {rank: _RankStatus(heard_at=self.began) for rank in self.ranks}
        self._lasted: dict[_Key, deque[float]] = {}
        self._episodes: dict[tuple[str, int, str], _Episode] = {}
        self._alarm: HangReport | None = None
        self._alarm_at = 0.0

    # --- what is seen ---

    def heard(self, rank: int, sample: Sample, now: float) -> None:
        """A rank's side thread has published."""
        item = self._ranks[rank]
        if sample.phase != item.sample.phase:
            item.phase_since = now
        item.sample, item.heard_at, item.look = sample, now, None

    def looked(self, rank: int, state: str, cpu_s: float, place: str = "") -> None:
        """The process of a silent rank was looked at from outside; `place` as in Sample, if that was found out."""
        item = self._ranks[rank]
        before = item.look
        if place:
            item.sample = replace(item.sample, place=place, doing="")
        busy = before is not None and (cpu_s - before.cpu_s > 0.05 or (before.busy and cpu_s == before.cpu_s))
        item.look = ProcessSample(state, cpu_s, busy)

    def ended(self, rank: int, groups: Mapping[str, GroupState] | None = None) -> None:
        """A rank has finished the cell, with these collectives."""
        item = self._ranks[rank]
        item.ended = True
        if groups:
            item.sample = Sample(**{**vars(item.sample), "groups": groups, "op": ""})

    def silent(self, now: float) -> list[int]:
        """Ranks that should have said something by now."""
        limit = SILENT_HEARTBEATS * heartbeat_s(self.floor_s)
        return [rank for rank, item in self._ranks.items() if not item.ended and now - item.heard_at > limit]

    # --- the rule ---

    def check(self, now: float) -> HangReport | None:
        """Something to tell, if it is new."""
        silent = set(self.silent(now))
        waits = self._waits(now, silent)
        late = self._late(waits, now, silent)
        blocked = [wait for wait in waits.values() if wait.missing]
        self._learn(waits, late, now)
        if late:
            return self._tell(self._report_late(late, waits, silent), now)
        if blocked and not self._somebody_moves(waits, silent) and self._all_overdue(blocked):
            return self._tell(self._report_deadlock(list(waits.values())), now)
        return self._recover(waits, silent, now)

    def _waits(self, now: float, silent: set[int]) -> dict[int, _Wait]:
        """Who is blocked in a collective."""
        blocked = {
            rank: item for rank, item in self._ranks.items() if item.sample.op and not item.ended and rank not in silent
        }
        waits = {}
        for rank, item in blocked.items():
            lasts = item.sample.still_s + now - item.heard_at
            group, number, missing = self._missing(rank, item.sample, set(blocked))
            waits[rank] = _Wait(rank, group, number, item.sample.op, item.sample.place, lasts, missing)
        return waits

    def _missing(self, rank: int, sample: Sample, blocked: set[int]) -> tuple[str, int, frozenset[int]]:
        in_flight = {name: state for name, state in sample.groups.items() if state.begun > state.finished}
        if not in_flight:  # send, recv, new_group: not counted; whoever is blocked as well is not to blame
            others = set(range(self.world_size)) - blocked
            if not others and all(self._ranks[other].sample.op.startswith("recv") for other in blocked):
                others = blocked - {rank}
            return "", 0, frozenset(others)
        missing: set[int] = set()
        name, state = next(iter(in_flight.items()))
        for other_name, other_state in in_flight.items():
            absent = {m for m in other_state.ranks if self._begun(m, other_name) < other_state.begun}
            if absent and not missing:
                name, state = other_name, other_state
            missing |= absent
        missing |= self._in_another(rank, name, state, sample.op)
        return name, state.begun, frozenset(missing - {rank})

    def _begun(self, rank: int, group: str) -> int:
        item = self._ranks.get(rank)
        state = item.sample.groups.get(group) if item is not None else None
        return state.begun if state is not None else 0

    def _in_another(self, rank: int, group: str, state: GroupState, op: str) -> set[int]:
        """Members that have entered another operation under the same number: they can never meet."""
        found = set()
        for member in state.ranks:
            other = self._ranks[member].sample if member in self._ranks else None
            if other is None or member == rank or not (other.op and op) or "collective" in (op, other.op):
                continue
            theirs = other.groups.get(group)
            same = theirs is not None and theirs.begun == state.begun and theirs.finished < theirs.begun
            if same and other.op != op:
                found.add(member)
        return found

    def _late(self, waits: dict[int, _Wait], now: float, silent: set[int]) -> dict[int, _Late]:
        """Late ranks beyond their budget."""
        awaited: dict[int, list[_Wait]] = {}
        for wait in waits.values():
            for rank in wait.missing - set(waits):
                awaited.setdefault(rank, []).append(wait)
        late = {}
        for rank, by in awaited.items():
            longest = max(by, key=lambda wait: wait.lasts_s)
            if limit_s := self._limit_passed(rank, longest, silent, now):
                late[rank] = _Late(longest.lasts_s, limit_s)
        for rank in silent - set(late):
            lasts = now - self._ranks[rank].heard_at
            if lasts >= self.floor_s and self._is_late_alone(rank, silent):
                late[rank] = _Late(lasts, self.floor_s)
        return late

    def _is_late_alone(self, rank: int, silent: set[int]) -> bool:
        """A silent rank for which nobody waits: one that is stopped, or is idle while others go on."""
        look = self._ranks[rank].look
        if look is None:
            return False
        if look.state in ("T", "t"):
            return True
        return look.state == "S" and not look.busy and any(other not in silent for other in self._running())

    def _limit_passed(self, rank: int, wait: _Wait, silent: set[int], now: float) -> float:
        """The limit of a wait that has passed it; 0 for one that has not."""
        item = self._ranks.get(rank)
        if item is None or item.ended or rank in silent:
            return self.floor_s if wait.lasts_s >= self.floor_s else 0.0
        phase, patience = item.sample.phase, self.floor_s * PATIENCE
        base = patience if phase in PATIENT and item.sample.working else self.floor_s
        in_phase = min(wait.lasts_s, now - item.phase_since)
        # Who goes from phase to phase without ever arriving is late as well.
        limits = ((in_phase, self._budget(base, phase, wait)), (wait.lasts_s, self._budget(patience, "", wait)))
        return next((limit_s for lasts_s, limit_s in limits if lasts_s >= limit_s), 0.0)

    def _budget(self, base: float, phase: str, wait: _Wait) -> float:
        return max(base, FACTOR * _p99(self._lasted.get((phase, wait.place), ())))

    def _running(self) -> list[int]:
        return [rank for rank, item in self._ranks.items() if not item.ended]

    def _somebody_moves(self, waits: dict[int, _Wait], silent: set[int]) -> bool:
        return any(rank not in waits for rank in self._running()) or bool(silent)

    def _all_overdue(self, blocked: Sequence[_Wait]) -> bool:
        return min(wait.lasts_s for wait in blocked) >= self.floor_s

    # --- what is normal here ---

    def _learn(self, waits: dict[int, _Wait], late: Mapping[int, _Late], now: float) -> None:
        """Remember how long waits that ended have lasted, but not those for a rank that stood still."""
        present: dict[tuple[str, int, str], _Episode] = {}
        for wait in waits.values():
            known = self._episodes.get((wait.group, wait.number, wait.place), _Episode())
            present[(wait.group, wait.number, wait.place)] = known
            for rank in wait.missing - set(waits):
                known.teaches = known.teaches and (rank not in late or self._visibly_works(rank))
                if (item := self._ranks.get(rank)) is not None:
                    spell = min(wait.lasts_s, now - item.phase_since)
                    for phase, lasts in ((item.sample.phase, spell), ("", wait.lasts_s)):
                        key = (phase, wait.place)
                        known.lasted[key] = max(known.lasted.get(key, 0.0), lasts)
        for name, episode in self._episodes.items():
            if name not in present and episode.teaches:
                for key, lasted in episode.lasted.items():
                    self._lasted.setdefault(key, deque(maxlen=REMEMBERED)).append(lasted)
        self._episodes = present

    def _visibly_works(self, rank: int) -> bool:
        item = self._ranks.get(rank)
        return item is not None and item.sample.working and item.look is None

    # --- telling ---

    def _tell(self, report: HangReport, now: float) -> HangReport | None:
        if self._alarm is not None and (self._alarm.late, self._alarm.waiting) == (report.late, report.waiting):
            return None
        # Of those that were told fewer are late: no news. That nobody is late any more, and all wait, is.
        before = self._alarm
        grown = before is not None and bool(before.late) <= bool(report.late) and set(before.late) >= set(report.late)
        if self._alarm is None:
            self._alarm_at = now
        self._alarm = report
        return None if grown else report

    def _recover(self, waits: dict[int, _Wait], silent: set[int], now: float) -> HangReport | None:
        alarm = self._alarm
        still_waiting = alarm is not None and any(
            rank in waits and waits[rank].lasts_s >= self.floor_s and waits[rank].missing for rank in alarm.waiting
        )
        if alarm is None or still_waiting or silent & set(alarm.late):
            return None
        self._alarm = None
        who = alarm.late or alarm.waiting
        lasted = self.floor_s + now - self._alarm_at
        return HangReport(f"{_ranks(who)} {_verb(who, 'goes', 'go')} on after {lasted:.0f} s.", who, recovered=True)

    def _report_late(self, late: Mapping[int, _Late], waits: dict[int, _Wait], silent: set[int]) -> HangReport:
        clauses: dict[str, list[int]] = {}
        for rank in sorted(late):
            clauses.setdefault(self._where(rank, late[rank].lasts_s, silent), []).append(rank)
        words = [f"{_ranks(ranks)} {_verb(ranks, 'is', 'are')} late: {where}" for where, ranks in clauses.items()]
        waiting = [wait for wait in waits.values() if wait.missing]
        words += _describe_waits(waiting)
        text = "; ".join(words) + ". Press Stop to interrupt, or wait."
        has_left = any(item is not None and item.ended for item in map(self._ranks.get, late))
        text += OUT_OF_DATA if has_left and any(wait.op.startswith(IN_TRAINING) for wait in waiting) else ""
        longest = max(late.values(), key=lambda item: item.lasts_s)
        blocked = tuple(sorted(wait.rank for wait in waiting))
        return HangReport(text, tuple(sorted(late)), blocked, lasts_s=longest.lasts_s, limit_s=longest.limit_s)

    def _where(self, rank: int, lasts_s: float, silent: set[int]) -> str:
        item = self._ranks.get(rank)
        if item is None:
            return f"it takes no part in this cell (--ranks), yet others have waited {lasts_s:.0f} s for it"
        if item.ended:
            return f"it has reached the end of the cell, yet others have waited {lasts_s:.0f} s for it"
        sample = item.sample
        if rank in silent:
            last = f", last seen at {sample.place}," if sample.place else ""
            return f"{describe_state(item.look)}{last} for {lasts_s:.0f} s"
        doing = f" ({sample.doing})" if sample.doing else ""
        return f"at {sample.place or 'an unknown place'}{doing} for {lasts_s:.0f} s"

    def _report_deadlock(self, blocked: Sequence[_Wait]) -> HangReport:
        words = "; ".join(_describe_waits(blocked))
        text = f"the ranks wait for each other and cannot go on: {words}. Press Stop to interrupt."
        lasts_s = max(wait.lasts_s for wait in blocked)
        waiting = tuple(sorted(wait.rank for wait in blocked))
        return HangReport(text, (), waiting, lasts_s=lasts_s, limit_s=self.floor_s)


def _describe_waits(waits: Sequence[_Wait]) -> list[str]:
    folded: dict[str, list[int]] = {}
    for wait in sorted(waits, key=lambda wait: wait.rank):
        at = f" at {wait.place}" if wait.place else ""
        folded.setdefault(f"in {wait.title}{at}", []).append(wait.rank)
    return [f"{_ranks(ranks)} {_verb(ranks, 'waits', 'wait')} {where}" for where, ranks in folded.items()]


def describe_state(look: ProcessSample | None) -> str:
    """What a process is doing that does not answer."""
    if look is None:
        return "does not answer"
    if look.state in ("T", "t"):
        return "its process is stopped (SIGSTOP; `kill -CONT` lets it go on)"
    if look.state == "D":
        return "its process waits for a disk or a device"
    if look.busy or look.state == "R":
        return "its process is busy in native code that does not release the GIL"
    return "its process sleeps in native code that does not release the GIL"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {format_ranks(list(ranks))}"


def _verb(ranks: Sequence[int], one: str, many: str) -> str:
    return one if len(ranks) == 1 else many


def _p99(durations: Sequence[float] | deque[float]) -> float:
    return sorted(durations)[math.ceil(0.99 * len(durations)) - 1] if durations else 0.0
