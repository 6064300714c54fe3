"""The rows of workers that train apart: what a lost one had still to train on is trained by the others.

A loader that Accelerate prepares, or that `lc.data.load` makes, gives each worker its share of a pass. At the end of
its share a worker waits for the others, and takes its part of what was left by those that are lost meanwhile.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from accelerate.utils import send_to_device

from jupyter_llmcloud.core.parallel.left_rows import Batches, PassRows, Place
from jupyter_llmcloud.training.data.rank_batches import RankBatches


class _Recorded:
    """The batches of a sampler, which are remembered as they are drawn."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.batches: Batches = []
        self.batch_size, self.drop_last = source.batch_size, source.drop_last

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self._source:
            self.batches.append(list(batch))  # a copy: Accelerate lengthens some of them
            yield batch

    def __len__(self) -> int:
        return len(self._source)


class _Known:
    """A sampler that gives these batches."""

    def __init__(self, found: _Recorded) -> None:
        self._batches = found.batches
        self.batch_size, self.drop_last = found.batch_size, found.drop_last

    def __iter__(self) -> Iterator[list[Any]]:
        return (list(batch) for batch in self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class SharedBatches(Protocol):
    """A batch sampler that knows what all workers have of its present pass.

    Attributes:
        num_drawn: batches of this worker so far.
    """

    num_drawn: int

    def batches_of(self, worker: int) -> Batches:
        """What a worker has of the pass."""


class RecordedShard(BatchSamplerShard):
    """Accelerate's share of a worker, with the order of the whole pass, which all workers draw alike."""

    num_drawn = 0
    batch_sampler: Any

    def __iter__(self) -> Iterator[list[Any]]:
        self.num_drawn = 0
        self._recorded = _Recorded(self.batch_sampler)
        own, inner = super().__iter__(), self.batch_sampler
        self.batch_sampler = self._recorded  # for the first batch alone: then it is iterated already
        try:
            batch = next(own, None)
        finally:
            self.batch_sampler = inner
        while batch is not None:
            self.num_drawn += 1
            yield batch
            batch = next(own, None)

    def batches_of(self, worker: int) -> Batches:
        """What a worker has of the pass, once that is drawn to its end."""
        known = _Known(self._recorded)
        return list(BatchSamplerShard(known, self.num_processes, worker, self.split_batches, self.even_batches))


class CountedBatches(RankBatches):
    """The share of a worker of data that `lc.data.load` loads."""

    num_drawn = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.num_drawn = 0
        self._begun = (self.position.epoch, self.position.start, self.position.stands_in)
        for batch in super().__iter__():
            self.num_drawn += 1
            yield batch

    def batches_of(self, worker: int) -> Batches:
        """What a worker has of the pass."""
        epoch, start, stands_in = self._begun
        return [[]] * stands_in + self.batches(worker, epoch, start)


def adopt(loader: Any) -> SharedBatches | None:
    """The batch sampler of a loader, which knows what others have of it from now on; None where nothing can know."""
    sampler: Any = getattr(getattr(loader, "base_dataloader", None), "batch_sampler", None)
    if not isinstance(loader, DataLoaderShard) or not hasattr(loader.dataset, "__getitem__"):
        return None
    if type(sampler) is BatchSamplerShard:
        sampler.__class__ = RecordedShard
    elif type(sampler) is RankBatches:
        sampler.__class__ = CountedBatches
    return sampler if isinstance(sampler, RecordedShard | CountedBatches) else None


class PassEnd(Protocol):
    """Who waits for the others at the end of a phase of a pass."""

    def __call__(self, key: str, phase: int) -> tuple[list[int], dict[int, Place]]:
        """Returns who is there, and where in the pass those were that are lost; nobody: it has ended."""


class SharedPasses:
    """The passes of one cell that are trained on.

    Args:
        worker: the number of this one.
        wait: for the others, at the end of a phase.

    Attributes:
        places: where this worker is in the passes that are under way.
    """

    def __init__(self, worker: int, wait: PassEnd) -> None:
        self._worker = worker
        self._wait = wait
        # By loader: its number, and how many passes have begun. Not by id, which the next one may have again.
        self._ordinals: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        self._num_loaders = 0
        self.places: dict[str, Place] = {}

    def begin(self, loader: Any, sampler: SharedBatches, own: Iterator[Any]) -> Iterator[Any]:
        """A pass whose batches are `own`, then those that this worker takes over."""
        if loader not in self._ordinals:
            self._ordinals[loader] = [self._num_loaders, 0]
            self._num_loaders += 1
        row = self._ordinals[loader]
        key = f"{row[0]}.{row[1]}"
        row[1] += 1
        return self._pass(key, loader, sampler, own)

    def _pass(self, key: str, loader: Any, sampler: SharedBatches, own: Iterator[Any]) -> Iterator[Any]:
        self.places[key] = (0, 0)
        try:
            yield from self._own(key, loader, sampler, own)
            rows, phase = PassRows(sampler.batches_of), 0
            while (answer := self._wait(key, phase))[1]:
                phase += 1
                yield from self._taken_over(key, phase, loader, rows.take_over(answer[1], answer[0], self._worker))
        finally:
            self.places.pop(key, None)

    def _own(self, key: str, loader: Any, sampler: SharedBatches, own: Iterator[Any]) -> Iterator[Any]:
        with contextlib.closing(own) if hasattr(own, "close") else contextlib.nullcontext():  # type: ignore[type-var]
            for number, batch in enumerate(own):
                # Accelerate has drawn one more, unless there is none; workers of the loader have drawn any number.
                ahead = not loader.end_of_dataloader
                self.places[key] = (0, sampler.num_drawn - ahead if loader.num_workers == 0 else number + 1)
                yield batch

    def _taken_over(self, key: str, phase: int, loader: Any, batches: Batches) -> Iterator[Any]:
        self.places[key] = (phase, 0)
        loader.begin()
        for number, batch in enumerate(_fetched(loader, batches), 1):
            loader.end_of_dataloader = number == len(batches)
            self.places[key] = (phase, number)
            yield batch
        loader.end()


def _fetched(loader: Any, batches: Batches) -> Iterator[Any]:
    """As the loader would deliver them."""
    dataset: Any = loader.dataset
    several: Callable[[list[Any]], Any] | None = getattr(dataset, "__getitems__", None)
    for rows in batches:
        data = several(rows) if several is not None else [dataset[row] for row in rows]
        batch = loader.collate_fn(data)
        yield batch if loader.device is None else send_to_device(batch, loader.device)
