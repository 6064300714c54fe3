"""What a pass over a loader draws from: the loader's own iterator, begun at its first batch or after some."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset

from jupyter_llmcloud.training.checkpoint import rng as randomness
from jupyter_llmcloud.training.data.rank_loader import RankLoader


class InnerIterators:
    """The iterators that loaders make while a pass draws from them: parts of that pass, and no passes of their own.

    A context: a loader that begins within it is an inner one.
    """

    def __init__(self) -> None:
        self._drawing: list[None] = []  # one for each draw; lists are changed whole, also where threads draw
        self._advance: tuple[Any, int, dict[str, Any] | None] | None = None
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()  # loaders that have made an iterator in this process
        self._with_workers: weakref.WeakSet[Any] = weakref.WeakSet()  # which they would have by now
        self._others_with_workers: Callable[[], Iterable[Any]] = tuple

    def clear(self) -> None:
        """A new cell."""
        self._advance = None
        self._with_workers.clear()

    def __enter__(self) -> None:
        self._drawing.append(None)

    def __exit__(self, *_: Any) -> None:
        self._drawing.pop()

    @property
    def is_drawing(self) -> bool:
        """Whether a loader that begins now is an inner one."""
        return bool(self._drawing)

    def advance(self, loader: Any, number: int, rng: dict[str, Any] | None) -> None:
        """The next iterator of this (inner) loader passes over `number` batches without reading them."""
        self._advance = (loader, number, rng)

    def follows_passes(self, loader: Any) -> None:
        """The next iterator of this (inner) loader is not its first; on the way back earlier ones were not made."""
        if _keeps_workers(loader) and loader not in self._made:
            self._with_workers.add(loader)

    @contextlib.contextmanager
    def with_workers(self, loaders: Callable[[], Iterable[Any]]) -> Iterator[None]:
        """Within the block these (inner) loaders would have workers by now, if theirs stay."""
        self._others_with_workers = loaders
        try:
            yield
        finally:
            self._others_with_workers = tuple

    def _would_have_workers(self, loader: Any) -> bool:
        others = self._others_with_workers()
        return loader in self._with_workers or (loader not in self._made and any(one is loader for one in others))

    def iterator_of(self, loader: Any, original: Callable[[Any], Iterator[Any]]) -> Any:
        """What `original` makes for a loader, advanced if that was asked for.

        Workers that stay were seeded by the first pass. Where they are started for a later one, the number for that is
        drawn from a copy: the order of the rows, and all that is drawn from here on, would be another.
        """
        if not _keeps_workers(loader):
            return self._advanced(loader, original(loader))
        with _drawing_from_a_copy(loader) if self._would_have_workers(loader) else contextlib.nullcontext():
            iterator = original(loader)
        self._made.add(loader)
        self._with_workers.discard(loader)
        return self._advanced(loader, iterator)

    def _advanced(self, loader: Any, iterator: Any) -> Any:
        if self._advance is None or self._advance[0] is not loader:
            return iterator
        _, number, rng = self._advance
        self._advance = None
        for _ in range(number):
            next(iterator._sampler_iter)
        return AdvancedBase(iterator, rng) if rng is not None else iterator


def _keeps_workers(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and loader.persistent_workers


@contextlib.contextmanager
def _drawing_from_a_copy(loader: Any) -> Iterator[None]:
    own = loader.generator
    copy = torch.Generator("cpu" if own is None else own.device)
    copy.set_state(torch.get_rng_state() if own is None else own.get_state())
    loader.generator = copy
    try:
        yield
    finally:
        loader.generator = own


class AdvancedBase:
    """The iterator of a prepared loader's inner loader: before its second item the generators are as they were then."""

    def __init__(self, source: Any, rng: dict[str, Any]) -> None:
        self._source = source
        self._rng: dict[str, Any] | None = rng
        self._num_drawn = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._num_drawn += 1
        if self._num_drawn == 2 and self._rng is not None:
            randomness.restore(self._rng)
            self._rng = None
        return next(self._source)


class LoaderSource:
    """The batches of a loader. `original` makes its iterator, as if nobody looked."""

    def __init__(self, loader: Any, original: Callable[[Any], Iterator[Any]], inner: InnerIterators) -> None:
        self.loader = loader
        self._original = original
        self._inner = inner
        self._iterator: Iterator[Any] | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is something to draw from."""
        return self._iterator is not None

    def follows_passes(self) -> None:
        """It is opened for a pass that is not the loader's first."""
        self._inner.follows_passes(getattr(self.loader, "base_dataloader", self.loader))

    def open(self) -> None:
        """Begin with the first batch."""
        with self._inner:
            self._iterator = iter(self._inner.iterator_of(self.loader, self._original))

    def open_after(self, number: int, rng_of_last_call: dict[str, Any] | None) -> int:
        """Begin when `number` batches are used; returns how many of these are still to be drawn, and thrown away.

        What was used is passed over by the sampler and never read, but for the last batch.
        """
        is_shard = isinstance(self.loader, RankLoader) or type(self.loader) is DataLoaderShard
        base = self.loader.base_dataloader if is_shard else self.loader
        if number and _draws_in_this_process(base):
            self._inner.advance(base, number - 1, rng_of_last_call if is_shard and number > 1 else None)
            number = 1
        self.open()
        return number

    def rows_after(self, number: int) -> int | None:
        """Rows of the epoch, over all ranks, that `number` batches have used; None where that is not known."""
        return self.loader.rows_after(number) if isinstance(self.loader, RankLoader) else None

    @property
    def identity(self) -> str | None:
        """The rows and their order, where that is known."""
        return self.loader.identity if isinstance(self.loader, RankLoader) else None

    def open_at(self, rows: int, number: int, rng_of_last_call: dict[str, Any] | None) -> int:
        """As `open_after`, behind so many rows, which may have been used by another number of ranks."""
        self.loader.position.go_on_at(rows, number, stand_in=number > 0)
        in_process = self.loader.num_workers == 0
        self._inner.advance(self.loader.base_dataloader, 0, rng_of_last_call if in_process and number > 1 else None)
        self.open()
        return min(number, 1)

    def draw(self) -> Any:
        """The next batch. Raises StopIteration after the last one."""
        assert self._iterator is not None
        with self._inner:
            return next(self._iterator)


class StepSource(LoaderSource):
    """The numbers of the steps of `run.steps(total)`."""

    def follows_passes(self) -> None:
        """They have no workers."""

    def __init__(self, total: int, inner: InnerIterators) -> None:
        super().__init__(range(total), iter, inner)

    def open_after(self, number: int, rng_of_last_call: dict[str, Any] | None) -> int:
        """Count on."""
        self._iterator = iter(range(number, len(self.loader)))
        return 0


def _draws_in_this_process(loader: Any) -> bool:
    return (
        type(loader) is DataLoader
        and loader.num_workers == 0
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )
