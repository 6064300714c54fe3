"""Which complete lines of the ranks can be shown now, and which of them are shown as one.

Every item waits up to `hold_s` for the same one of other ranks. The order of each rank's own items is always kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_RICH_PATIENCE = 10  # ranks draw the same figure at moments further apart than they print the same line
_STDERR_PATIENCE = 2  # a warning comes when a rank gets there, which depends on how fast it loads
_LOOK_AHEAD = 32  # how many lines of a rank may be pulled forward to reach one that can be folded


class Item:
    """A complete line or a rich record of one rank, waiting."""

    __slots__ = ("arrived", "key", "line", "rank", "record", "shown")

    def __init__(
        self, rank: int, key: tuple[str, str], arrived: float, record: Mapping[str, Any] | None, line: str = ""
    ) -> None:
        self.rank = rank
        self.key = key
        self.arrived = arrived
        self.record = record
        self.line = line
        self.shown = False


class FoldQueue:
    """Items of ranks in, groups of equal items out. Time is an argument: any clock going forward.

    Args:
        hold_s: how long a line of stdout waits for the same line of the other ranks, in seconds.
    """

    def __init__(self, ranks: Iterable[int], hold_s: float) -> None:
        self.hold_s = hold_s
        self._queues: dict[int, deque[Item]] = {rank: deque() for rank in ranks}
        self._arrivals: deque[Item] = deque()
        self._waiting: dict[tuple[str, str], dict[int, int]] = {}  # by key: how many items of each rank

    def add_rank(self, rank: int) -> None:
        """A rank that joined later: from now on an item waits for it as well."""
        self._queues.setdefault(rank, deque())

    def add(self, item: Item) -> None:
        """An item begins to wait, behind all others of its rank."""
        self._queues[item.rank].append(item)
        self._arrivals.append(item)
        ranks = self._waiting.setdefault(item.key, {})
        ranks[item.rank] = ranks.get(item.rank, 0) + 1

    def has(self, key: tuple[str, str]) -> bool:
        """Whether an item of this key waits."""
        return key in self._waiting

    def next_deadline(self) -> float | None:
        """When `ready` has something to give at the latest, None when nothing waits."""
        head = self._head()
        return None if head is None else head.arrived + self._patience(head)

    def _head(self) -> Item | None:
        """The item that has waited longest; it is also the first of its own rank."""
        while self._arrivals and self._arrivals[0].shown:
            self._arrivals.popleft()
        return self._arrivals[0] if self._arrivals else None

    def _patience(self, item: Item) -> float:
        if item.record is not None:
            return self.hold_s * _RICH_PATIENCE
        return self.hold_s * _STDERR_PATIENCE if item.key[0] == "stderr" else self.hold_s

    def ready(self, now: float, final: bool) -> Iterator[list[Item]]:
        """What to show, in order: the equal items of one or several ranks, that of the lowest rank first."""
        while (item := self._head()) is not None:
            everywhere = len(self._waiting[item.key]) == len(self._queues) and self._heads_all(item.key)
            if not (everywhere or final or now - item.arrived >= self._patience(item)):
                return
            yield from self._fold(item)

    def _heads_all(self, key: tuple[str, str]) -> bool:
        return all(queue and queue[0].key == key for queue in self._queues.values())

    def _fold(self, item: Item) -> Iterator[list[Item]]:
        """Show `item` for every rank that has it waiting where nothing else of another rank is in the way."""
        together = []
        for rank in sorted(self._waiting[item.key]):
            if rank != item.rank:
                before = self._in_the_way(rank, item.key)
                if before is None:
                    continue
                for _ in range(before):
                    yield [self._leave(rank)]
            together.append(rank)
        yield [self._leave(rank) for rank in together]

    def _in_the_way(self, rank: int, key: tuple[str, str]) -> int | None:
        """How many of the rank's lines come before `key`; None when one of them may yet be folded itself."""
        for at, item in enumerate(self._queues[rank]):
            if item.key == key:
                return at
            if at == _LOOK_AHEAD or len(self._waiting[item.key]) > 1:
                return None
        return None

    def _leave(self, rank: int) -> Item:
        item = self._queues[rank].popleft()
        item.shown = True
        ranks = self._waiting[item.key]
        ranks[rank] -= 1
        if not ranks[rank]:
            del ranks[rank]
            if not ranks:
                del self._waiting[item.key]
        return item
