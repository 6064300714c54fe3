"""How much of a cell is taken, and by which ranks, so that what ranks clear is free again."""

from __future__ import annotations

from collections.abc import Collection, Set

MAX_RICH_CHARS = 4_000_000  # figures are what a cell is run for: a budget of their own
LEAST = 2_000  # characters that every rank has, whatever the others write


class Budget:
    """Characters shown, of at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._by_ranks: dict[frozenset[int], int] = {}
        self._by_rank: dict[int, float] = {}

    @property
    def remaining(self) -> int:
        """Characters that may still be shown."""
        return self.limit - self.used

    def take(self, ranks: tuple[int, ...], size: int) -> None:
        """Something of these ranks is shown."""
        key = frozenset(ranks)
        self._by_ranks[key] = self._by_ranks.get(key, 0) + size
        for rank in key:
            self._by_rank[rank] = self._by_rank.get(rank, 0.0) + size / len(key)
        self.used += size

    def remaining_for(self, ranks: Collection[int], everybody: Collection[int]) -> float:
        """What is left for these ranks: a little of it is kept for every other one that has shown little yet."""
        least = min(LEAST, self.limit / (4 * max(1, len(everybody))))
        kept = sum(max(0.0, least - self._by_rank.get(rank, 0.0)) for rank in everybody if rank not in ranks)
        return self.remaining - kept

    def clear(self, ranks: Set[int]) -> None:
        """These ranks take back what is theirs; what others have said as well stays."""
        before, self._by_ranks, self._by_rank, self.used = self._by_ranks, {}, {}, 0
        for owners, size in before.items():
            if not owners or owners - ranks:
                self.take(tuple(owners - ranks), size)


class CellBudget:
    """The budgets of a cell's text and of its displays.

    Attributes:
        is_full: whether text or displays are left out since they do not fit.
        num_dropped_rich: displays that did not fit.
    """

    def __init__(self, max_chars: int) -> None:
        self._text = Budget(max_chars)
        self.is_full = False
        self.num_dropped_rich = 0
        self._rich = Budget(MAX_RICH_CHARS)

    def remaining_for(self, ranks: Collection[int], everybody: Collection[int]) -> float:
        """Characters of text that are left for these ranks, as in Budget."""
        return self._text.remaining_for(ranks, everybody)

    def take_text(self, ranks: tuple[int, ...], size: int) -> None:
        """Text of these ranks is shown; of no rank in particular when there are none."""
        self._text.take(ranks, size)

    def take_rich(self, ranks: tuple[int, ...], size: int, update: bool) -> bool:
        """Whether a display of these ranks fits; an update replaces what was there and takes nothing more."""
        if size > self._rich.remaining:
            self.num_dropped_rich += 1
            return False
        if not update:
            self._rich.take(ranks, size)
        return True

    def clear(self, ranks: Set[int]) -> None:
        """These ranks take back what is theirs; the cell is full no more when half of each budget is free."""
        for budget in (self._text, self._rich):
            budget.clear(ranks)
        if all(budget.used < budget.limit / 2 for budget in (self._text, self._rich)):
            self.is_full = False
