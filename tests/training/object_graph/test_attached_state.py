"""State that hangs on other objects, and orders that no value tells: restored as it was."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.object_graph import set_order
from jupyter_llmcloud.training.object_graph.kinds.dispatch import kind_of
from jupyter_llmcloud.training.object_graph.liveness import names_written
from tests.support.object_graphs import resumed
from tests.support.resumed_cells import DATA_SET


class Units(np.ndarray):  # type: ignore[type-arg]
    """An array of a class of the cell's own."""


class Dropped:
    """A hook that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return gradient / self.calls


def with_hits(tensor: torch.Tensor) -> torch.Tensor:
    tensor.hits, tensor.seen, tensor._count = 0, [], 0  # type: ignore[attr-defined]
    return tensor


def bump(tensor: Any) -> None:
    tensor.hits, tensor._count = tensor.hits + 1, tensor._count + 1
    tensor.seen.append(tensor.hits)


def told(tensor: Any) -> Any:
    return tensor.hits, tensor.seen, tensor._count


def frozen_layer() -> torch.nn.Module:
    layer = torch.nn.Linear(2, 1)
    with_hits(layer.weight.requires_grad_(False))
    return layer


def counting_hook() -> Any:
    number = 0

    def hook(*_: Any) -> None:
        nonlocal number
        number += 1
        numbers.append(number)

    numbers: list[int] = []
    hook.numbers = numbers  # type: ignore[attr-defined]
    return hook


def hooked_layer() -> Any:
    layer = torch.nn.Linear(2, 1)
    layer.register_forward_hook(counting_hook())
    layer.weight.register_hook(Dropped())
    return layer


def use_layer(layer: Any) -> None:
    for _ in range(3):
        layer(torch.ones(1, 2)).sum().backward()


def of_hooks(layer: Any) -> Any:
    [forward], [backward] = layer._forward_hooks.values(), layer.weight._backward_hooks.values()
    layer(torch.ones(1, 2))
    return forward.numbers[-1], backward.calls


def hooked_optimizer() -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    optimizer.register_step_post_hook(counting_hook())
    return optimizer


def of_step_hooks(optimizer: Any) -> Any:
    [hook] = optimizer._optimizer_step_post_hooks.values()
    hook()
    return hook.numbers[-1]


def shrink(pool: set[int]) -> None:
    pool.difference_update(set(pool) - {5, 700, 900, 64})


def units() -> Any:
    made = np.zeros(3).view(Units)
    made.unit = "m"  # type: ignore[attr-defined]
    return made


def masked() -> Any:
    table = np.ma.zeros(9000)
    return table, table.data


Case = tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]
CASES: dict[str, Case] = {
    "attributes of a tensor": (lambda: with_hits(torch.zeros(3)), bump, told),
    "attributes of a frozen parameter": (frozen_layer, lambda v: bump(v.weight), lambda v: told(v.weight)),
    "what hooks of a module have counted": (hooked_layer, use_layer, of_hooks),
    "what hooks of an optimizer have counted": (
        hooked_optimizer,
        lambda v: [v.step() for _ in range(3)],
        of_step_hooks,
    ),
    "attributes of an array of an own class": (units, lambda v: setattr(v, "unit", "km"), lambda v: (type(v), v.unit)),
    "a masked array and a view of it": (
        masked,
        lambda v: v[0].__setitem__(8000, 5),
        lambda v: (v[1][8000], np.shares_memory(v[0].data, v[1])),
    ),
    "the order of a small set": (set, lambda v: v.update([7, 15]), list),
    "the order of a set that has shrunk": (lambda: set(range(1000)), shrink, list),
    "the order of a frozenset": (list, lambda v: v.append(frozenset([7, 15])), lambda v: list(v[0])),
    "what a generator of numpy has spawned": (
        lambda: np.random.default_rng(3),
        lambda v: v.spawn(2),
        lambda v: v.spawn(1)[0].random(),
    ),
    "bytes, and buffers of them, that are empty": (
        lambda: [b"", bytearray(b"a"), io.BytesIO()],
        lambda v: v[1].clear(),
        lambda v: (v[0], v[1], v[2].getvalue()),
    ),
    "an empty text of numpy": (list, lambda v: v.append(np.str_("")), repr),
    "a column of categories": (
        lambda: pd.Series(["a", "b", "a"], dtype="category"),
        lambda v: v.__setitem__(0, "b"),
        lambda v: (list(v), list(v.cat.categories)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_hangs_on_others_or_is_in_no_value_comes_back(name: str) -> None:
    make, change, look = CASES[name]
    restored, undisturbed = resumed(lambda: {"value": make()}, lambda names: change(names["value"]))
    assert look(restored["value"]) == look(undisturbed["value"])


def test_a_tensor_that_is_there_gets_its_attributes_and_stays_the_same_object() -> None:
    made = {"value": with_hits(torch.zeros(3))}
    restored, _ = resumed(lambda: made, lambda names: bump(names["value"]))
    assert restored["value"] is made["value"]


def disturb(pool: set[int], numbers: random.Random, times: int) -> None:
    for _ in range(times):
        at = numbers.randrange(600)
        if pool and numbers.random() < 0.3:
            pool.pop()
        numbers.choice([pool.add, pool.discard])(at)
        if numbers.random() < 0.1:
            pool -= {numbers.randrange(600) for _ in range(9)}
        if numbers.random() < 0.1:
            pool |= {at, at + 1, at + 7}


def test_a_set_delivers_its_items_in_the_order_of_an_undisturbed_one_whatever_becomes_of_both() -> None:
    for seed in range(100):
        pool, numbers = set(range(seed * 3)), random.Random(seed)
        disturb(pool, numbers, seed)
        again: set[int] = {1}
        set_order.fill(again, list(pool), set_order.places(pool))
        assert list(again) == list(pool)
        for each in (pool, again):
            disturb(each, random.Random(seed), 50)
        assert list(again) == list(pool)


def test_a_set_whose_items_have_other_hashes_than_they_had_has_them_all_the_same() -> None:
    there = set_order.places({"a", "b", "c"})
    again: set[str] = set()
    set_order.fill(again, ["x", "y", "z"], there)
    set_order.fill(again, ["x", "y"], there)
    assert again == {"x", "y"}
    assert all(item in again for item in ("x", "y"))


def test_the_names_that_a_cell_writes_are_the_users_whatever_they_are_called() -> None:
    cell = compile("_i = 0\nfor _ in x: y = 1\ndef f():\n  global __n\n  __n = 1\n  z = 2", "cell", "exec")
    assert names_written(cell) == {"_i", "_", "y", "f", "__n"}
    assert names_written(cell.co_consts[next(n for n, c in enumerate(cell.co_consts) if hasattr(c, "co_names"))]) == {
        "z"
    }


def test_a_data_set_is_the_same_by_its_making_or_its_rows() -> None:
    names: dict[str, Any] = {"torch": torch}
    exec(DATA_SET, names)
    kind = kind_of(made := names["Dataset"]([1.0, 2.0], "made"))
    head, _ = kind.split(made)
    kind.fill(names["Dataset"]([1.0, 2.0], "made by what cannot be told"), head, [])
    with pytest.raises(ResumeMissed, match="the cell has made another data set"):
        kind.fill(names["Dataset"]([2.0, 1.0], "other"), head, [])
