"""How much of a cell's room is taken, and by which ranks, so that what is taken back can be given back."""

from __future__ import annotations

from collections.abc import Collection, Set

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
