"""Streams that have no length: every rank passes over the stream and takes its share of each block of rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from jupyter_llmcloud.core.data.shares import EpochShares
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.data.rank_batches import Group, Position


class StreamShare(IterableDataset[Any]):
    """Batches (lists of rows) of this rank. At the end of the stream the last rows are shared out as evenly as it goes.

    Args:
        seed: of Hugging Face's shuffling by a buffer of `buffer` rows; None: the order of the stream.

    Attributes:
        epoch: of the next pass.
        num_processes, global_batch: as of RankBatches.
    """

    def __init__(self, source: Any, group: Group, last: str, seed: int | None, buffer: int) -> None:
        if seed is not None:
            source = source.shuffle(seed=seed, buffer_size=buffer)
        self.position = Position()
        self._source = source
        self._group = group
        self._last = last
        EpochShares(group.global_batch, group.global_batch, group.size, 0, last)  # which raises what is wrong

    @property
    def epoch(self) -> int:
        """Of the next pass."""
        return self.position.epoch

    def set_epoch(self, epoch: int) -> None:
        """As of data sets of Hugging Face."""
        self.position.epoch = epoch

    @property
    def num_processes(self) -> int:
        """Ranks that share a batch."""
        return self._group.size

    @property
    def global_batch(self) -> int:
        """Rows of a step over all ranks."""
        return self._group.global_batch

    def has_steps_after(self, rows: int) -> bool:
        """As of RankBatches; nobody knows before the stream has ended."""
        return True

    @property
    def remainder(self) -> int:
        """As of RankBatches; -1: not known."""
        return -1 if self._last == "pad" else 0

    def shares(self, start: int) -> EpochShares:
        """Of a stream that goes on for ever."""
        return EpochShares(1 << 62, self.global_batch, self._group.size, start, "drop")

    def __iter__(self) -> Iterator[list[Any]]:
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(self.position.epoch)
        start, stand_in = self.position.begin()
        block, size, rank = self.global_batch, self._group.size, self._group.rank
        source = iter(self._source)
        before = start - min(start, block) if stand_in else start
        if sum(1 for _ in islice(source, before)) < before:
            raise UsageError(f"the stream has fewer rows than the {start} that were used of it: it has changed.")
        if stand_in:
            rows = list(islice(source, start - before))
            yield [rows[place % len(rows)] for place in EpochShares(block, block, size).places(0, rank)]
        held: list[Any] = []
        num_seen = start
        while rows := list(islice(source, block)):
            num_seen += len(rows)
            if len(rows) == block:
                if held:
                    yield _share(held, rank, size)
                held = rows
                continue
            if self._last == "share" and held and len(rows) < size:
                held += rows  # a step of its own would leave ranks without a row
            else:
                if held:
                    yield _share(held, rank, size)
                held = rows if self._last != "drop" else []
        if not held:
            return
        if len(held) < size and num_seen < size:
            raise UsageError(f"the stream has {num_seen} rows for {size} ranks: use fewer ranks, or more data.")
        if self._last == "pad" and len(held) < block:
            held = [held[place % len(held)] for place in range(block)]
        yield _share(held, rank, size) if len(held) >= size else [held[rank % len(held)]]


def _share(rows: list[Any], rank: int, size: int) -> list[Any]:
    return rows[len(rows) * rank // size : len(rows) * (rank + 1) // size]
