"""What two ranks did in a rehearsal, compared: where they would wait for each other for ever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

# Ranks may give tensors of different sizes to these.
_MAY_DIFFER = {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"}
TOGETHER, POINT, PROBLEM = "together", "point to point", "problem"
LOADER, LOADER_END = "loader", "end of loader"
LEFT = "left"


@dataclass(frozen=True)
class RankAct:
    """Something that a rank did.

    Attributes:
        kind: `TOGETHER` for what all ranks must do, `POINT` for what one waits in for another, `LOADER` for a pass over
            data and `LOADER_END` for its end, `PROBLEM` for what is wrong here.
        what: the collective, the number of batches, the number of the act that has ended, or what is wrong.
        where: "Cell In[4], line 3".
        shape: of the tensor, and its type; of the end of a pass `LEFT`, where the cell does not want all batches.
        group: ranks that take part.
        ended: whether it came back.
        number: of the act, by which the end of a pass names it.
    """

    kind: str
    what: str
    where: str
    shape: str = ""
    group: tuple[int, ...] = ()
    ended: bool = False
    number: int = 0


@dataclass(frozen=True)
class RankStory:
    """What a rank did, in order, and how it ended: "" while it goes on."""

    entries: Sequence[RankAct] = ()
    end: str = ""


def findings(stories: Mapping[int, RankStory]) -> list[str]:
    """What is wrong, in words; nothing when the ranks agree as far as they came."""
    found = [
        f"{entry.where}: {entry.what} (rank {rank})."
        for rank, story in sorted(stories.items())
        for entry in story.entries
        if entry.kind == PROBLEM
    ]
    first, *others = sorted(stories)
    for other in others:
        found += _different_loaders(stories, first, other)
        apart = _first_difference(stories, first, other) or _waiting_for_each_other(stories, first, other)
        found += [apart] if apart else []
    return list(dict.fromkeys(found))


def is_stuck(stories: Mapping[int, RankStory]) -> bool:
    """Whether they can only wait from here on: one is in a collective that another has left out."""
    first, *others = sorted(stories)
    return any(_first_difference(stories, first, other) for other in others)


def wait_for_each_other(stories: Mapping[int, RankStory]) -> bool:
    """Whether one waits for what another will not do, where that stays so: what was sent may be on its way."""
    first, *others = sorted(stories)
    return any(_waiting_for_each_other(stories, first, other) for other in others)


def _waiting_for_each_other(stories: Mapping[int, RankStory], one: int, other: int) -> str:
    a, b = (next(reversed(_unended(stories[rank])), None) for rank in (one, other))
    if a is not None and b is not None and a.kind == b.kind == POINT and a.what == b.what:
        return (
            f"{a.where}: rank {one} waits in {a.what}, and rank {other} in {b.what} at {b.where}. They wait for each "
            "other for ever: one has to send while the other receives (batch_isend_irecv does both at once)."
        )
    for rank, absent, act in ((one, other, a), (other, one, b)):
        if act is not None and act.kind == POINT and (end := stories[absent].end):
            return f"{act.where}: rank {rank} waits in {act.what}, which rank {absent} never answers: {end}."
    return ""


def _unended(story: RankStory) -> list[RankAct]:
    return [entry for entry in story.entries if entry.kind in (TOGETHER, POINT) and not entry.ended]


def _different_loaders(stories: Mapping[int, RankStory], one: int, other: int) -> list[str]:
    pairs = zip(*(_passes(stories[rank]) for rank in (one, other)), strict=False)
    return [
        f"{a.where}: rank {one} has {a.what} batches, rank {other} has {b.what}. The one with more waits in its next "
        "collective for ever. Give each rank as many (drop_last=True, or let accelerator.prepare split the data)."
        for (a, with_others, is_left), (b, with_others_too, is_left_too) in pairs
        if a.where == b.where
        and a.what != b.what
        # Where nothing is done together in it, as in an evaluation of its own rows, a rank may have more than another;
        # and a cell that ends the longer pass by itself may have agreed upon the number of steps.
        and (with_others or with_others_too)
        and not (is_left if int(a.what) > int(b.what) else is_left_too)
    ]


def _passes(story: RankStory) -> list[tuple[RankAct, bool, bool]]:
    """Passes over loaders; whether ranks do something together within each; whether the cell has ended it early."""
    found = []
    for begin, entry in enumerate(story.entries):
        if entry.kind == LOADER:
            inside, is_left = list[RankAct](), False
            for act in story.entries[begin + 1 :]:
                if act.kind == LOADER_END and act.what == str(entry.number):
                    is_left = act.shape == LEFT
                    break
                inside.append(act)
            found.append((entry, any(act.kind == TOGETHER for act in inside), is_left))
    return found


def _first_difference(stories: Mapping[int, RankStory], one: int, other: int) -> str:
    shared = [
        [entry for entry in stories[rank].entries if entry.kind == TOGETHER and _takes_part(entry, one, other)]
        for rank in (one, other)
    ]
    for a, b in zip_longest(*shared):
        if a is None or b is None:
            rank, absent, entry = (other, one, b) if a is None else (one, other, a)
            return "" if not stories[absent].end or entry.ended else _missed(rank, absent, entry, stories[absent])
        if a.what != b.what:
            return (
                f"{a.where}: rank {one} enters {a.what}, while rank {other} enters {b.what} at {b.where}. They wait "
                "for each other for ever. A collective must be reached by every rank, in the same order."
            )
        if a.shape != b.shape and a.what not in _MAY_DIFFER:
            return (
                f"{a.where}: {a.what} gets {a.shape} on rank {one} and {b.shape} on rank {other}. All ranks must give "
                "tensors of the same shape and type: pad them (accelerator.pad_across_processes)."
            )
    return ""


def _takes_part(entry: RankAct, one: int, other: int) -> bool:
    return not entry.group or {one, other} <= set(entry.group)


def _missed(rank: int, absent: int, entry: RankAct, story: RankStory) -> str:
    return (
        f"{entry.where}: rank {rank} waits in {entry.what}, which rank {absent} never enters: {story.end}. A "
        "collective inside `if rank == 0` (or is_main_process), or behind a loop of another length, makes the others "
        "wait for ever."
    )
