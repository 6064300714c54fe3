"""Which ranks a world has, as rules: what a death, a renewal of the process group or a resize takes, step by step.

Ranks that have died are replaced, and every change of the members makes a new generation of the process group, which
all join. A step that fails leaves the members as they were before it; what is needed is then asked again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from jupyter_llmcloud.errors import WorldError


@dataclass(frozen=True)
class Renumber:
    """Go on without the ranks that are not named; the others get new numbers, in their order: {old: new}."""

    numbers: dict[int, int]


@dataclass(frozen=True)
class ForkRanks:
    """Fork ranks that there were not before, wherever there are slots for them."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Replace:
    """Fork ranks that have died."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Drop:
    """End the ranks from this number on."""

    num_ranks: int


@dataclass(frozen=True)
class JoinGroup:
    """Have every rank join the process group of a generation."""

    generation: int


@dataclass(frozen=True)
class Restore:
    """Run the definition cells on ranks that are new processes."""

    ranks: tuple[int, ...]


MembershipStep = Renumber | ForkRanks | Replace | Drop | JoinGroup | Restore


@dataclass
class Membership:
    """The ranks of one world.

    Attributes:
        size: how many ranks there are to be.
        generation: of the process group that was joined last, also in vain; -1 before the first.
        dead: ranks whose process has gone.
        must_renew: the process group cannot be used again.
        is_reshaped: whether there have been more or fewer of them than at first, by themselves.
        is_started: whether all have ever met; those that have not are started anew, as in a world that was taken over.
    """

    size: int
    generation: int = -1
    dead: set[int] = field(default_factory=set)
    must_renew: bool = False
    is_reshaped: bool = False
    is_started: bool = False

    @property
    def ranks(self) -> range:
        """Their numbers."""
        return range(self.size)

    def start(self) -> list[MembershipStep]:
        """What it takes to have the first ranks."""
        return [ForkRanks(tuple(self.ranks)), JoinGroup(0)]

    def repair(self, has_store: bool = True) -> list[MembershipStep]:
        """What it takes until every rank lives and is in the group; nothing when they are.

        Raises WorldError when the store by which ranks meet has gone.
        """
        if not self.is_started:
            return [*self.start(), Restore(tuple(self.ranks))]
        if not self.dead and not self.must_renew:
            return []
        if not has_store:
            raise WorldError("the process that holds the world's store has ended: start new ranks with %world restart.")
        dead = tuple(sorted(self.dead))
        return [Replace(dead), JoinGroup(self.generation + 1), Restore(dead)]

    def resize(self, size: int) -> list[MembershipStep]:
        """What it takes to have `size` ranks, in a group that needs no repair: the highest end, or more are started."""
        join = JoinGroup(self.generation + 1)
        if size < self.size:
            return [Drop(size), join]
        added = tuple(range(self.size, size))
        return [ForkRanks(added), join, Restore(added)] if added else []

    def reshape(self, lost: Iterable[int], num_added: int, has_store: bool = True) -> list[MembershipStep]:
        """What it takes to go on without the ranks that are `lost`, and with so many more, in one new group.

        Those that stay keep their variables. With nobody left all are started anew, as in a world that was taken over.
        """
        gone = set(lost)
        self.is_reshaped |= bool(gone or num_added)
        staying = [rank for rank in self.ranks if rank not in gone]
        if not self.is_started or not staying:
            self.size, self.is_started = num_added, False
            self.dead.clear()
            return self.repair()
        if not gone and not num_added:
            return self.repair(has_store)
        if not has_store:
            raise WorldError("the process that holds the world's store has ended: start new ranks with %world restart.")
        numbers = {old: new for new, old in enumerate(staying)}
        dead = tuple(numbers[rank] for rank in sorted(self.dead - gone))
        added = tuple(range(len(staying), len(staying) + num_added))
        steps: list[MembershipStep] = [Renumber(numbers)] if gone else []
        steps += [Replace(dead)] if dead else []
        steps += [ForkRanks(added)] if added else []
        return [*steps, JoinGroup(self.generation + 1), Restore((*dead, *added))]

    def renumbered(self, numbers: Mapping[int, int]) -> None:
        """Only these are left, under new numbers."""
        self.size, self.must_renew = len(numbers), True
        self.dead = {numbers[rank] for rank in self.dead if rank in numbers}

    def died(self, rank: int) -> bool:
        """A process has gone; False when it was none of these ranks any more."""
        if rank >= self.size:
            return False
        self.dead.add(rank)
        return True

    def replacing(self, ranks: Iterable[int]) -> None:
        """These ranks get a new process from now on: if that dies, it has died anew."""
        self.dead -= set(ranks)

    def not_replaced(self, ranks: Iterable[int]) -> None:
        """They could not be had."""
        self.dead |= set(ranks)

    def start_anew(self) -> None:
        """The first ranks could not meet, and have been ended."""
        self.dead.clear()

    def joining(self, generation: int) -> None:
        """A generation counts also when the join fails: what was said in the store would confuse the next."""
        self.generation, self.must_renew = generation, True

    def joined(self) -> None:
        """All are in the group."""
        self.must_renew, self.is_started = False, True
