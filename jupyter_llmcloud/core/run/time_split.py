"""Where the time of each rank goes: computing, data loaders, collectives, waiting for other ranks, checkpoints.

A rank knows for how long it was blocked in collectives, not why: it may have waited for another rank, or for the
network. The rank that was blocked least has waited for nobody, so what it spent is what communication takes, and what
the others spent beyond that is waiting. The two are compared between common points of all ranks: (optimizer steps,
collectives since the last step). Between the newest common point and now they are compared as they stand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

PARTS = ("compute", "communication", "data", "waiting", "checkpoint")
WINDOW_S = 10.0  # what "now" is
MIN_SPAN_S = 0.5  # of a window, before it says anything
MAX_POINTS = 10_000  # of a rank that others do not come to

Split = dict[str, float]  # by the names of PARTS
Point = tuple[int, int, float]  # steps, collectives since then, seconds blocked until then


@dataclass
class _RankTimes:
    """One rank of an attempt. Seconds, since its cell began there.

    Attributes:
        parts: computing, blocked, in data, in checkpoints.
        blocked_at_match, waited: until the newest common point: blocked, and of that waiting.
        earlier: seconds by part before this attempt.
        history: (time, seconds by part) when it was heard, as far as the window reaches.
    """

    parts: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    points: deque[Point] = field(default_factory=lambda: deque(maxlen=MAX_POINTS))
    blocked_at_match: float = 0.0
    waited: float = 0.0
    earlier: tuple[float, ...] = (0.0,) * len(PARTS)
    history: deque[tuple[float, tuple[float, ...]]] = field(default_factory=deque)

    @property
    def unmatched(self) -> float:
        return max(0.0, self.parts[1] - self.blocked_at_match)


class TimeSplits:
    """Of the ranks of one run, over all its attempts. Time is an argument, in seconds of one clock.

    Args:
        earlier: seconds by rank and part that another leader has counted.
    """

    def __init__(self, earlier: Mapping[int, Mapping[str, float]] | None = None) -> None:
        self._ranks = {
            rank: _RankTimes(earlier=tuple(float(parts.get(name, 0.0)) for name in PARTS))
            for rank, parts in (earlier or {}).items()
        }
        self._present: tuple[int, ...] = ()

    def begin(self, ranks: Iterable[int]) -> None:
        """An attempt begins on these ranks."""
        known = {rank: self._seconds(rank) for rank in self._ranks}
        self._present = tuple(ranks)
        nothing = (0.0,) * len(PARTS)
        self._ranks = {rank: _RankTimes(earlier=known.get(rank, nothing)) for rank in {*known, *self._present}}

    def heard(self, rank: int, now: float, parts: Sequence[float], points: Iterable[Sequence[float]] = ()) -> None:
        """What a rank has spent since its cell began.

        Args:
            parts: seconds computing, blocked in collectives, in data loaders, in checkpoints.
            points: passed since it was heard last: rows of steps, collectives since then, seconds blocked until then.
        """
        item = self._ranks.get(rank)
        if item is None or len(parts) != len(item.parts) or sum(parts) < sum(item.parts):
            return  # said before what is known already
        item.parts = (parts[0], parts[1], parts[2], parts[3])
        item.points += [(int(steps), int(number), float(blocked)) for steps, number, blocked in points]
        self._match()
        item.history.append((now, self._seconds(rank)))
        while len(item.history) > 2 and item.history[1][0] <= now - WINDOW_S:
            item.history.popleft()

    def _match(self) -> None:
        items = [self._ranks[rank] for rank in self._present]
        while items and all(item.points for item in items):
            newest = max(item.points[0][:2] for item in items)
            if all(item.points[0][:2] == newest for item in items):
                blocked = [item.points.popleft()[2] for item in items]
                spent = [now - item.blocked_at_match for item, now in zip(items, blocked, strict=True)]
                for item, now, own in zip(items, blocked, spent, strict=True):
                    item.waited += own - min(spent)
                    item.blocked_at_match = now
                continue
            for item in items:
                while item.points and item.points[0][:2] < newest:
                    item.points.popleft()

    def _seconds(self, rank: int) -> tuple[float, ...]:
        item = self._ranks[rank]
        compute, blocked, data, checkpoint = item.parts
        least = min((self._ranks[other].unmatched for other in self._present), default=0.0)
        waiting = min(blocked, max(0.0, item.waited + item.unmatched - least if rank in self._present else 0.0))
        own = (compute, blocked - waiting, data, waiting, checkpoint)
        return tuple(before + now for before, now in zip(item.earlier, own, strict=True))

    def seconds(self) -> dict[int, Split]:
        """What each rank has spent so far, over all attempts."""
        return {rank: dict(zip(PARTS, self._seconds(rank), strict=True)) for rank in sorted(self._ranks)}

    def shares(self) -> dict[int, Split]:
        """How each rank has spent the last ten seconds, as shares that add up to 1; nothing of one that is new.

        Nor of one that is silent all that time, whose process is stopped, say: what it did before is not what it does.
        """
        found = {}
        histories = {rank: history for rank in self._present if (history := self._ranks[rank].history)}
        newest = max((history[-1][0] for history in histories.values()), default=0.0)
        for rank, history in histories.items():
            if history[-1][0] < newest - WINDOW_S:
                continue
            first = history[0][1] if len(history) > 1 else self._ranks[rank].earlier
            spent = [max(0.0, now - before) for now, before in zip(self._seconds(rank), first, strict=True)]
            if sum(spent) >= MIN_SPAN_S:
                found[rank] = shares_of(dict(zip(PARTS, spent, strict=True)))
        return found


def shares_of(seconds: Mapping[str, float]) -> Split:
    """Of the whole, which is not nothing."""
    whole = sum(seconds.values()) or 1.0
    return {name: seconds.get(name, 0.0) / whole for name in PARTS}


def in_words(shares: Mapping[str, float]) -> str:
    """`compute 62 %, data 30 %, waiting 8 %`: what is more than half a percent, the most first."""
    shown = sorted(((share, name) for name, share in shares.items() if share >= 0.005), reverse=True)
    return ", ".join(f"{name} {100 * share:.0f} %" for share, name in shown)
