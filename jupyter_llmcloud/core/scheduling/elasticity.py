"""A run whose number of ranks may change, as rules: when it looks for room, and when it saves what it has done.

    executed, smaller than it may be --LookForRoom--> RoomFound --Pause--> a checkpoint, the attempt is stopped
                                                      NoMoreRoom: again in a while

What lies between two attempts is decided in core.run.run_machine, which ranks stay in core.run.membership.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.core.tick import Tick

ROOM_RETRY_S = 2.0  # how often an elastic run that is smaller than it may be looks for room
SAVE_EVERY_S = 0.5  # at the least, between the checkpoints of an elastic run that was told no other rhythm
SAVE_SHARE = 0.02  # of a rank's processor time that such checkpoints may cost


@dataclass(frozen=True)
class SizeBounds:
    """How many ranks an elastic run may have."""

    least: int
    most: int

    @classmethod
    def of(cls, text: str) -> SizeBounds | None:
        """Of `MIN:MAX` as the option has it; None of a run that is not elastic."""
        if not text:
            return None
        least, most = map(int, text.split(":"))
        return cls(least, most)

    def above(self, num_ranks: int) -> str:
        """As the option has it, with more ranks than these at the least."""
        return f"{min(num_ranks + 1, self.most)}:{self.most}"

    def to_ask(self, staying: int) -> SizeBounds:
        """How many more ranks to ask the cluster for, beside so many that stay."""
        return SizeBounds(max(self.least - staying, 0), max(self.most - staying, 0))


@dataclass(frozen=True)
class WorkerLoad:
    """What the agent beside a Dask worker has, for who decides how many workers there are.

    Attributes:
        holds: ranks, worlds, runs or replicas: it must stay.
        wants: ranks that elastic runs which it leads could have besides.
    """

    num_slots: int
    free_slots: int
    holds: bool
    wants: int = 0


def workers_wanted(loads: Iterable[WorkerLoad]) -> int:
    """How many workers it takes for what there is, and for what elastic runs could have."""
    every = list(loads)
    held = [load for load in every if load.holds]
    lacking = sum(load.wants for load in held) - sum(load.free_slots for load in held)
    return len(held) + -(-max(0, lacking) // max((load.num_slots for load in every), default=1))


def workers_to_close(loads: Mapping[Any, WorkerLoad], number: int) -> list[Any]:
    """At most so many of the workers that hold nothing."""
    return [name for name, load in loads.items() if not load.holds][: max(0, number)]


# --- events


@dataclass(frozen=True)
class RoomFound:
    """An elastic run that is executed could have more ranks."""


@dataclass(frozen=True)
class NoMoreRoom:
    """It could not, or it could not be interrupted for that."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was asked for is written, or none could be had; it has cost so much processor time."""

    seconds: float


@dataclass(frozen=True)
class LeaveOutAsked:
    """A rank is slow: an elastic run is to go on without its host. `why` says so in words."""

    rank: int
    why: str


Event = RoomFound | NoMoreRoom | Saved | Tick


@dataclass(frozen=True)
class LookForRoom:
    """Could the run have more ranks? -> RoomFound, NoMoreRoom."""


@dataclass(frozen=True)
class Pause:
    """Save a checkpoint and stop the attempt, which goes on with more ranks -> AttemptFinished, or else NoMoreRoom."""


@dataclass(frozen=True)
class Save:
    """Have a checkpoint of the next step -> Saved."""


@dataclass(frozen=True)
class LeaveOut:
    """The host of this rank has no rank of the run any more, and gets none again."""

    rank: int


Instruction = LookForRoom | Pause | Save


@dataclass
class Elasticity:
    """What an elastic run does while it is executed: it looks for room for more ranks, and saves what it has done.

    Attributes:
        most: how many ranks it may have.
        size: how many it has.
        saves: whether it saves in a rhythm of its own, since it was told no other.
        is_pausing: the attempt is being stopped for more ranks.
    """

    most: int
    size: int
    saves: bool = True
    is_pausing: bool = False
    _look_at: float | None = None
    _save_at: float | None = None

    @property
    def wake_at(self) -> float | None:
        """When there is something to be done."""
        return min((at for at in (self._look_at, self._save_at) if at is not None), default=None)

    def begin(self, now: float) -> None:
        """An attempt begins."""
        self.is_pausing = False
        self._look_at = now + ROOM_RETRY_S if self.size < self.most else None
        self._save_at = now + SAVE_EVERY_S if self.saves else None

    def end(self) -> bool:
        """An attempt has ended; returns whether it was to."""
        was_pausing, self.is_pausing = self.is_pausing, False
        self._look_at = self._save_at = None
        return was_pausing

    def worker_joined(self) -> list[Instruction]:
        """A worker has come: there may be room at once."""
        if self._look_at is None:
            return []
        self._look_at = None
        return [LookForRoom()]

    def pause(self) -> list[Instruction]:
        """Stop the attempt after a checkpoint, to go on with other ranks."""
        self.is_pausing, self._save_at, self._look_at = True, None, None
        return [Pause()]

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """What to do about an event while an attempt is executed."""
        match event:
            case RoomFound():
                return self.pause()
            case NoMoreRoom():
                if self.is_pausing:
                    self._save_at = now + SAVE_EVERY_S if self.saves else None
                self.is_pausing, self._look_at = False, now + ROOM_RETRY_S
            case Saved(seconds) if self.saves and not self.is_pausing:
                self._save_at = now + max(SAVE_EVERY_S, seconds / SAVE_SHARE)
            case Tick():
                return self._tick(now)
        return []

    def _tick(self, now: float) -> list[Instruction]:
        out: list[Instruction] = []
        if self._look_at is not None and now >= self._look_at:
            self._look_at = None
            out.append(LookForRoom())
        if self._save_at is not None and now >= self._save_at:
            self._save_at = None
            out.append(Save())
        return out
