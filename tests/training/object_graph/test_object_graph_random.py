"""Objects and changes drawn at random: what is restored is what an undisturbed training has, and shares what it shares."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.support.object_graphs import Names, resumed  # noqa: E402
from tests.training.object_graph.test_object_graph import Meter, Record, Slotted, equal  # noqa: E402


def an_object(source: random.Random, pool: list[Any], depth: int = 0) -> Any:
    """Something new, or something that is there already; `pool` holds every container and memory made so far."""
    if pool and source.random() < 0.2:
        return source.choice(pool)
    number = source.randrange(14 if depth < 4 else 7)
    made: Any
    if number == 0:
        return source.choice([None, True, 3, -0.5, "text", b"bytes", 2**80, float("inf")])
    if number == 1:
        made = torch.zeros(
            source.choice([3, 5_000, 20_000]), dtype=source.choice([torch.float32, torch.int64, torch.bool])
        )
    elif number == 2:
        made = np.zeros(source.choice([(3,), (70, 90), (9_000,)]), source.choice(["f8", "i4", "U3", "datetime64[s]"]))
    elif number == 3:
        made = pd.DataFrame({"a": np.arange(2000.0), "b": [str(n) for n in range(2000)]})
    elif number == 4:
        tensors = [item for item in pool if isinstance(item, torch.Tensor) and item.numel() > 2]
        made = source.choice(tensors)[1::2] if tensors else torch.zeros(4)
    elif number == 5:
        arrays = [item for item in pool if isinstance(item, np.ndarray) and item.size > 2]
        made = source.choice(arrays)[1:] if arrays else np.zeros(4)
    elif number == 6:
        made = random.Random(source.randrange(99))
    elif number == 7:
        made = Meter()
        made.history = an_object(source, pool, depth + 1)
    elif number == 8:
        made = Record(1, [])
        made.names = an_object(source, pool, depth + 1)
    elif number == 9:
        made = Slotted()
    elif number == 10:
        return tuple(an_object(source, pool, depth + 1) for _ in range(source.randrange(3)))
    elif number == 11:
        made = {
            source.choice(["a", "b", 3, (1, 2)]): an_object(source, pool, depth + 1) for _ in range(source.randrange(4))
        }
    else:
        made = [an_object(source, pool, depth + 1) for _ in range(source.choice([0, 2, 5]))]
    pool.append(made)
    return made


def change(value: Any, source: random.Random, pool: list[Any]) -> None:
    """Change one thing in one object, as a step of a training would."""
    if isinstance(value, torch.Tensor) and value.numel():
        at = source.randrange(value.numel())
        value[at] = not value[at] if value.dtype == torch.bool else value[at] + 1
    elif isinstance(value, np.ndarray) and value.size:
        kind = value.dtype.kind
        value.reshape(-1)[source.randrange(value.size)] = {"U": "xyz", "M": np.datetime64("2020-01-01")}.get(kind, 7)
    elif isinstance(value, pd.DataFrame):
        value.loc[source.randrange(2100), source.choice(["a", "c"])] = source.random()
    elif isinstance(value, random.Random):
        value.random()
    elif isinstance(value, Meter):
        value.total += 1
        value.bins[source.randrange(1000)] += 1
    elif isinstance(value, Record):
        value.number += 1
    elif isinstance(value, Slotted):
        value.bump()
    elif isinstance(value, dict):
        value[source.choice(["a", "z", 7])] = an_object(source, pool)
    elif isinstance(value, list):
        source.choice([lambda: value.append(an_object(source, pool)), value.reverse, value.clear])()


def alike(one: Any, other: Any, known: dict[int, int]) -> bool:
    """Equal to the last bit, with the same objects in the same places: no two where there was one, no one for two."""
    if isinstance(one, int | float | str | bytes | None):
        return type(one) is type(other) and one == other
    if id(one) in known:
        return known[id(one)] == id(other)
    if id(other) in known.values():
        return False
    if not isinstance(one, tuple):
        known[id(one)] = id(other)
    if isinstance(one, random.Random):
        return one.getstate() == other.getstate()
    if isinstance(one, Meter):
        # Not as lists: those of a moment may get each other's ids.
        pairs = ((one.total, other.total), (one.history, other.history), (one.bins, other.bins))
        return all(alike(*pair, known) for pair in pairs)
    if isinstance(one, Record):
        return one.number == other.number and alike(one.names, other.names, known)
    if isinstance(one, Slotted):
        return one.both == other.both
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key], known) for key in one)
    if isinstance(one, list | tuple):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(alike(*pair, known) for pair in zip(one, other, strict=True))
        )
    return equal(one, other)


def memory_of(names: Names) -> list[Any]:
    """Where the memory of each tensor and array is, in the order in which they are met."""
    found: list[Any] = []
    pending, seen = list(names.values()), set()
    while pending:
        value = pending.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor | np.ndarray):
            found.append(value)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, Meter):
            pending += [value.bins, value.history]
        elif isinstance(value, Record):
            pending.append(value.names)
    return found


def shared(names: Names) -> list[tuple[int, int]]:
    """Which of them look into the same memory."""
    found = memory_of(names)
    arrays = [item.numpy() if isinstance(item, torch.Tensor) else item for item in found]
    return [(a, b) for a in range(len(arrays)) for b in range(a) if np.shares_memory(arrays[a], arrays[b])]


@settings(max_examples=200)
@given(st.integers(0, 2**32))
@example(37650764)  # another table takes the place of one that is kept elsewhere, part of which was not saved
def test_whatever_changes_is_restored_exactly_with_what_it_shares(seed: int) -> None:
    def make() -> Names:
        source, pool = random.Random(seed), []
        names = {f"v{number}": an_object(source, pool) for number in range(source.randrange(1, 7))}
        return {**names, "pool": pool}

    def train(names: Names) -> None:
        source = random.Random(seed + 1)
        for _ in range(source.randrange(1, 12)):
            pool = names["pool"]
            if pool and source.random() < 0.8:
                change(source.choice(pool), source, pool)
            else:
                names[f"v{source.randrange(8)}"] = an_object(source, pool)

    restored, undisturbed = resumed(make, train)
    assert alike(undisturbed, restored, {})
    assert shared(undisturbed) == shared(restored)
    # They go on alike as well: what is written through one view is seen by the others.
    for names in (undisturbed, restored):
        source = random.Random(seed + 2)
        for _ in range(5):
            if names["pool"]:
                change(source.choice(names["pool"]), source, names["pool"])
    assert alike(undisturbed, restored, {})
