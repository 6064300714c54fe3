"""Loaders by name, and the passes over them: counted, described in plain values, and restored, without a cell."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from jupyter_llmcloud.training.checkpoint import rng
from jupyter_llmcloud.training.resume.cell.frame_variables import keeps_batches
from jupyter_llmcloud.training.resume.loaders.iterator import TrackedIterator
from jupyter_llmcloud.training.resume.loaders.passes import PassHistory
from jupyter_llmcloud.training.resume.loaders.registry import LoaderRegistry
from jupyter_llmcloud.training.resume.loaders.source import InnerIterators, LoaderSource


class Cursor:
    """Of a cell that is not led back."""

    replaying = False

    def __init__(self) -> None:
        self.passes = PassHistory()
        self.inner = InnerIterators()

    def made(self, iteration: TrackedIterator) -> None:
        self.passes.made(iteration)

    def begin(self, iteration: TrackedIterator) -> None:
        iteration.key = "a"
        self.passes.begin(iteration)

    def plan(self, iteration: TrackedIterator) -> tuple[str, int]:
        return ("forward" if self.passes.is_pending("a", iteration.ordinal) else "run"), 0

    def take_up(self, iteration: TrackedIterator) -> None: ...

    def saved_pass(self, key: str) -> dict[str, Any]:
        found = self.passes.take_pending(key)
        assert found is not None
        return found

    def went_on(self) -> None: ...

    def before_batch(self, iteration: TrackedIterator) -> None: ...

    def after_batch(self, iteration: TrackedIterator) -> None:
        self.passes.note_batch(iteration)

    def finished(self, iteration: TrackedIterator) -> None:
        self.passes.finished(iteration)

    def over(self, loader: Any) -> TrackedIterator:
        return TrackedIterator(self, LoaderSource(loader, iter, self.inner))


class Counting(torch.utils.data.Dataset[int]):
    """Knows which of its rows were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 12

    def __getitem__(self, at: int) -> int:
        self.read.append(at)
        return at


def test_a_loader_is_named_by_the_order_in_which_the_loaders_of_its_cell_were_made() -> None:
    registry, first, second = LoaderRegistry(), DataLoader([1]), DataLoader([2])
    registry.begin_cell()
    registry.number(first)
    registry.begin_cell()
    registry.number(second)
    assert [registry.use(first), registry.use(second)] == ["old 1 1", "new 1"]
    assert registry.used() == {"old 1 1": first, "new 1": second}
    del first
    assert list(registry.used()) == ["new 1"]


def test_a_loader_that_is_made_later_gets_its_saved_order_with_its_next_pass() -> None:
    registry, loader = LoaderRegistry(), DataLoader(range(9), shuffle=True, generator=torch.Generator().manual_seed(3))
    registry.begin_cell()
    key = registry.use(loader)
    saved = registry.orders()
    wanted = [int(item) for item in loader]
    registry = LoaderRegistry()
    registry.begin_cell()
    registry.restore(5, saved)
    assert registry.use(loader) == key
    assert [int(item) for item in loader] != wanted
    registry.restore_order(key)
    assert [int(item) for item in loader] == wanted
    assert registry.num_made == 5


def test_passes_are_described_by_how_many_began_how_long_they_were_and_which_were_trained_on() -> None:
    cursor, loader = Cursor(), DataLoader(range(3))
    assert len(list(cursor.over(loader))) == 3
    under_way = cursor.over(loader)
    next(under_way)
    cursor.passes.note_step()
    found = cursor.passes.describe()
    assert (found["begun"], found["lengths"], found["trained"]) == ({"a": 2}, {"a": {0: 3}}, {"a": [1]})
    assert found["passes"]["a"]["handed_out"] == 1
    assert cursor.passes.last is under_way


def test_a_pass_that_was_under_way_goes_on_with_the_same_order_and_reads_nothing_twice() -> None:
    torch.manual_seed(5)
    before, rows = Cursor(), Counting()
    loader = DataLoader(rows, batch_size=2, shuffle=True)
    first = before.over(loader)
    used = [next(first).tolist() for _ in range(3)]
    saved = before.passes.describe()
    wanted = [batch.tolist() for batch in first]

    torch.manual_seed(99)
    after, rows.read = Cursor(), []
    after.passes.restore(saved, lambda _: "a")
    assert [batch.tolist() for batch in after.over(loader)] == wanted
    assert rows.read == [row for batch in (used[-1], *wanted) for row in batch]  # the last batch stands in
    assert after.passes.begun == {"a": 1}


def test_a_pass_that_has_begun_on_the_way_becomes_the_saved_one_or_ends() -> None:
    loader = DataLoader(range(6))
    before = Cursor()
    saved_pass = before.over(loader)
    for _ in range(4):
        next(saved_pass)
    saved = before.passes.describe()

    after = Cursor()
    same, another = after.over(loader), after.over(loader)
    next(same)
    next(another)
    after.passes.restore(saved, lambda _: "a")
    assert [int(item) for item in same] == [4, 5]
    assert list(another) == []


def test_a_pass_that_somebody_waits_to_go_on_with_is_nobody_elses() -> None:
    """As where epochs end after so many `next(batches)`: the next one asks for an iterator of its own."""
    before, loader = Cursor(), DataLoader(range(6))
    used = before.over(loader)
    for _ in range(4):
        next(used)
    saved = before.passes.describe()

    after = Cursor()
    waiting = after.over(loader)
    after.passes.restore(saved, lambda _: "a")
    assert after.passes.inherited == {"a"}
    assert after.passes.describe()["passes"] == saved["passes"], "for whoever goes on from here"
    new = after.over(loader)
    assert [int(item) for item in new] == [0, 1, 2, 3, 4, 5]
    assert [int(item) for item in waiting] == [4, 5]
    assert (new.ordinal, waiting.ordinal, after.passes.begun) == (1, 0, {"a": 2})


def test_a_pass_whose_iterator_nobody_has_any_more_is_over() -> None:
    before, loader = Cursor(), DataLoader(range(6))
    used = before.over(loader)
    next(used)
    saved = before.passes.describe()

    after = Cursor()
    waiting: Any = after.over(loader)
    after.passes.restore(saved, lambda _: "a")
    waiting = after.over(loader)
    gc.collect()
    assert after.passes.describe()["passes"] == {}
    assert [int(item) for item in waiting] == [0, 1, 2, 3, 4, 5]


def test_only_loaders_that_begin_while_a_pass_draws_are_inner_ones() -> None:
    inner = InnerIterators()
    assert not inner.is_drawing
    with inner, inner:
        assert inner.is_drawing
    assert not inner.is_drawing


def test_a_cycle_of_plain_values_is_no_cycle_of_batches() -> None:
    batches = DataLoader(TensorDataset(torch.arange(4)))
    plain, drawn = itertools.cycle([1, ("a", None)]), itertools.cycle(batches)
    next(plain), next(drawn)
    assert not keeps_batches(plain) and not keeps_batches(zip(itertools.cycle("ab"), range(3), strict=False))
    assert keeps_batches(drawn) and keeps_batches(itertools.cycle(n for n in [1]))
    for _ in range(9):
        next(drawn)
    assert keeps_batches(zip([1], drawn, strict=False)), "also when it only repeats what it has kept"


class Rounds(torch.utils.data.Sampler[int]):
    """A sampler of the cell's own: each pass has an order of its own, and leaves others behind."""

    def __init__(self) -> None:
        self.numbers, self.past, self.random = np.random.default_rng(5), [0], random.Random(2)

    def __iter__(self) -> Iterator[int]:
        self.past.append(self.past[-1] + 1)
        order = self.numbers.permutation(12).tolist()
        first = self.random.randrange(12) + self.past[-1]
        yield from (order[(first + at) % 12] for at in range(12))

    def __len__(self) -> int:
        return 12


class Endless(torch.utils.data.IterableDataset[int]):
    """A stream of the cell's own that goes on where the last pass over it ended."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        begin = self.at
        self.at += 12
        yield from range(begin, begin + 12)


@pytest.mark.parametrize("kind", ["sampler", "batch sampler", "stream"])
def test_a_pass_is_led_to_the_order_that_the_cells_own_sampler_had_when_it_began(kind: str) -> None:
    def loader() -> DataLoader[int]:
        if kind == "stream":
            return DataLoader(Endless(), batch_size=2)
        if kind == "sampler":
            return DataLoader(Counting(), batch_size=2, sampler=Rounds())
        return DataLoader(Counting(), batch_sampler=torch.utils.data.BatchSampler(Rounds(), 2, False))

    cursor, data = Cursor(), loader()
    for _ in range(2):
        list(cursor.over(data))
    third = cursor.over(data)
    used = [next(third).tolist() for _ in range(3)]
    saved = {"a": rng.loadable(third.position())}
    left = [batch.tolist() for batch in third]
    again = Cursor()  # the cell is executed again, and the bodies of finished passes are not
    iteration = again.over(loader())
    again.passes.begun = {"a": 2}
    again.passes._pending = saved
    assert [batch.tolist() for batch in iteration] == left
    assert used != left


def test_a_loader_has_its_saved_order_before_the_cell_gives_it_another_epoch() -> None:
    def made() -> tuple[LoaderRegistry, Any]:
        registry = LoaderRegistry()
        registry.begin_cell()
        loader = DataLoader(range(8), sampler=DistributedSampler(range(8), 1, 0), generator=torch.Generator())
        registry.number(loader)
        return registry, loader

    registry, loader = made()
    key = registry.use(loader)
    loader.sampler.set_epoch(3)
    loader.generator.manual_seed(7)
    orders = registry.orders()
    again, other = made()
    again.restore(1, orders)
    assert (other.sampler.epoch, other.generator.initial_seed()) == (3, 7)
    other.sampler.set_epoch(4)
    assert again.use(other) == key
    again.restore_order(key)
    assert other.sampler.epoch == 4
