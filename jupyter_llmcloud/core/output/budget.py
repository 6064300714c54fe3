"""How much of a cell's room is taken, and by which ranks, so that what is taken back can be given back."""

from __future__ import annotations

from collections.abc import Set


class Budget:
    """Characters shown, of at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._by_ranks: dict[frozenset[int], int] = {}

    @property
    def room(self) -> int:
        return self.limit - self.used

    def take(self, ranks: tuple[int, ...], size: int) -> None:
        """Something of these ranks is shown."""
        key = frozenset(ranks)
        self._by_ranks[key] = self._by_ranks.get(key, 0) + size
        self.used += size

    def clear(self, ranks: Set[int]) -> None:
        """These ranks take back what is theirs; what others have said as well stays."""
        before, self._by_ranks, self.used = self._by_ranks, {}, 0
        for owners, size in before.items():
            if not owners or owners - ranks:
                self.take(tuple(owners - ranks), size)
