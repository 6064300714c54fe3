"""The batches of this rank: which rows, in which order, from which row on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import BatchSampler

from jupyter_llmcloud.core.data.order import RowOrder
from jupyter_llmcloud.core.data.shares import EpochShares
from jupyter_llmcloud.training.parallel.balance import BALANCE, NO_RANKS

Expect = Callable[[list[int]], None]


def this_share() -> tuple[int, int]:
    """Which share of a batch this process takes, of how many: ranks that compute a batch together take one."""
    if (ranks := BALANCE.ranks) is not NO_RANKS:
        return ranks.rank, ranks.num
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Group:
    """Which of how many takes a share: this process, or what was said in its place.

    Args:
        batch_size: rows of a step for each; global_batch: for all together, in its place.
    """

    def __init__(self, rank: int | None, world_size: int | None, batch_size: int, global_batch: int | None) -> None:
        self._given = (rank, world_size)
        self._batch_size = batch_size
        self._global_batch = global_batch

    @property
    def rank(self) -> int:
        """Which one."""
        return this_share()[0] if self._given[0] is None else self._given[0]

    @property
    def size(self) -> int:
        """Of how many."""
        return this_share()[1] if self._given[1] is None else self._given[1]

    @property
    def global_batch(self) -> int:
        """Rows of a step over all; of an elastic run those of the world that it began with."""
        is_here = self._given[1] is None
        return self._global_batch or self._batch_size * (BALANCE.reference or self.size if is_here else self.size)

    def shares(self, num_rows: int, start: int, last: str) -> EpochShares:
        """What each takes of an epoch from a row on."""
        return EpochShares(num_rows, self.global_batch, self.size, start, last)


class Position:
    """Where a pass over the rows begins, and how its batches are counted; resumed exactly on any number of ranks.

    Attributes:
        epoch: of the next pass.
        start: rows of that epoch that were used before; it goes on behind them.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.start = 0
        self._stand_in = False
        self._begun_at = 0  # rows that were used when the present pass began here
        self._counted = 0  # batches of it that were counted before
        self._num_stand_ins = 0  # at the beginning of the present pass

    def go_on_at(self, rows: int, batches: int, stand_in: bool = False) -> None:
        """The next pass begins behind so many rows, which were that many batches.

        `stand_in`: its first batch is one that was used, in place of the last one before.
        """
        self.start, self._begun_at, self._counted, self._stand_in = rows, rows, batches, stand_in

    def begin(self) -> tuple[int, bool]:
        """A pass begins: behind how many rows, and whether with a batch that was used. The one after it is whole."""
        start, stand_in = self.start, self._stand_in
        self._num_stand_ins = int(stand_in)
        if not start and not stand_in:
            self._begun_at = self._counted = 0
        self.start, self._stand_in = 0, False
        return start, stand_in

    @property
    def stands_in(self) -> bool:
        """Whether the first batch of the next pass is one that was used."""
        return self._stand_in

    def rows_of(self, batch: int, shares: Callable[[int], EpochShares]) -> list[int]:
        """How many rows each rank has in this batch of the present pass; nothing of one that only stands in."""
        known, step = shares(self._begun_at), batch - self._num_stand_ins
        return [len(known.places(step, rank)) for rank in range(known.world_size)] if step >= 0 else []

    def rows_after(self, batches: int, shares: Callable[[int], EpochShares]) -> int:
        """Rows of the epoch that are used after so many batches of the present pass."""
        return shares(self._begun_at).rows_after(max(0, batches - self._counted))


class RankBatches(BatchSampler):
    """The rows of each step for this rank, by their numbers.

    Args:
        orders: gives the order of an epoch.
        expect: is told the rows of batches that come later.

    Attributes:
        epoch: of the next pass; Accelerate and loops of other libraries set it.
        drop_last, batch_size, num_processes, sampler: what they ask of a batch sampler.
    """

    drop_last = False

    def __init__(
        self,
        num_rows: int,
        group: Group,
        orders: Callable[[int], RowOrder],
        last: str = "share",
        expect: Expect | None = None,
        ahead: int = 2,
    ) -> None:
        self.num_rows = num_rows
        self.position = Position()
        self._group = group
        self._orders = orders
        self._last = last
        self._expect = expect
        self._ahead = ahead
        self.shares(0)  # which raises what is wrong

    def shares(self, start: int) -> EpochShares:
        """What each rank takes from a row on."""
        return self._group.shares(self.num_rows, start, self._last)

    def batches(self, rank: int, epoch: int, start: int) -> list[list[int]]:
        """All that a rank has of an epoch from a row on."""
        order, shares = self._orders(epoch), self.shares(start)
        return [[order[place] for place in shares.places(step, rank)] for step in range(shares.num_steps)]

    def has_steps_after(self, rows: int) -> bool:
        """Whether steps are left of an epoch when so many rows are used."""
        return rows < self.num_rows and self.shares(rows).num_steps > 0

    @property
    def remainder(self) -> int:
        """Rows of the last step of the next pass that are no filling; 0: all of them, as Accelerate counts."""
        return (self.num_rows - self.position.start) % self.global_batch if self._last == "pad" else 0

    @property
    def epoch(self) -> int:
        """Of the next pass."""
        return self.position.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.position.epoch = value

    def set_epoch(self, epoch: int) -> None:
        """As of samplers of torch."""
        self.position.epoch = epoch

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Rows of a step on one rank, of the largest share."""
        return -(-self._group.global_batch // self._group.size)

    @property
    def num_processes(self) -> int:
        """Ranks that share a batch."""
        return self._group.size

    @property
    def global_batch(self) -> int:
        """Rows of a step over all ranks."""
        return self._group.global_batch

    @property
    def sampler(self) -> range:  # type: ignore[override]
        """All rows, for who wants to know how many there are."""
        return range(self.num_rows)

    def __len__(self) -> int:
        return self.shares(self.position.start).num_steps

    def __iter__(self) -> Iterator[list[int]]:
        order = self._orders(self.position.epoch)
        start, stand_in = self.position.begin()
        shares, rank = self.shares(start), self._group.rank
        if stand_in:
            before = self._group.shares(self.num_rows, max(0, start - shares.global_batch), "pad")
            yield [order[place] for place in before.places(0, rank)]
        coming: list[list[int]] = []
        num_steps, drawn = shares.num_steps, 0
        while drawn < num_steps or coming:
            while drawn < num_steps and len(coming) <= self._ahead:
                rows = [order[place] for place in shares.places(drawn, rank)]
                drawn += 1
                coming.append(rows)
                if self._expect is not None:
                    self._expect(rows)
            yield coming.pop(0)
