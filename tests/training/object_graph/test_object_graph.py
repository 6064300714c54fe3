"""What changes in a training is saved and put back exactly, whatever it is, or refused by name: decided by values."""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import io
import itertools
import multiprocessing as mp
import pathlib
import random
import re
import sqlite3
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, WeightedRandomSampler
from tqdm.auto import tqdm
from transformers import BatchEncoding

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.serialization import NotPlain
from jupyter_llmcloud.training.object_graph.restore import NotSaved
from tests.support.object_graphs import Names, put, resumed, saved_by


class Meter:
    def __init__(self) -> None:
        self.total, self.history, self.bins = 0, [1.0], torch.zeros(1000)


class Slotted:
    __slots__ = ("__hidden", "total")

    def __init__(self) -> None:
        self.total, self.__hidden = 0, 0

    def bump(self) -> None:
        self.total += 1
        self.__hidden += 2

    @property
    def both(self) -> tuple[int, int]:
        return self.total, self.__hidden


@dataclasses.dataclass(slots=True)
class Record:
    number: int = 0
    names: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    number: int = 0


class Registry:
    known: dict[str, int] = {}
    count = 0


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


class OwnList(list):  # type: ignore[type-arg]
    limit = 0


class Memory(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(20_000), persistent=False)
        self.register_buffer("kept", torch.zeros(20_000))
        self.layer = torch.nn.Linear(2, 2)
        self.calls = 0


def counted() -> Any:
    counted.calls += 1  # type: ignore[attr-defined]


counted.calls = 0  # type: ignore[attr-defined]


def closure() -> Any:
    total, table = 0, torch.zeros(10_000)

    def add() -> int:
        nonlocal total
        total += 1
        table[total * 7] += 1
        return total + int(table.sum())

    return add


def defaulting() -> Any:
    def append(item: int, to: list[int] = []) -> None:  # noqa: B006
        to.append(item)

    return append


def sparse(value: Any, number: int = 3) -> None:
    for at in range(number):
        value[at * 1777 + 5] += 1


CONTEXT: contextvars.ContextVar[int] = contextvars.ContextVar("CONTEXT")


def equal(one: Any, other: Any) -> bool:
    """Equal to the last bit and of one type, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.layout is not torch.strided:
            one, other = one.to_dense(), other.to_dense()
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray) and not one.dtype.hasobject:
        return one.dtype == other.dtype and one.tobytes() == other.tobytes() and one.shape == other.shape
    if isinstance(one, pd.DataFrame | pd.Series | pd.Index):
        return one.equals(other) and repr(getattr(one, "dtypes", 0)) == repr(getattr(other, "dtypes", 0))
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | collections.deque | np.ndarray):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.nn.Module):
        return equal(dict(one.state_dict()), dict(other.state_dict()))
    return bool(one == other)


Case = tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]  # make, change, look at


def same(value: Any) -> Any:
    return value


Transition = collections.namedtuple("Transition", "state action")


class Lookahead(torch.optim.Optimizer):
    """An optimizer of the user's own, with more than its state_dict() tells."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.num_steps, self.slow = 0, [torch.zeros(3)]

    def step(self, closure: Any = None) -> None:
        self.num_steps += 1
        self.slow[0] += 1


class Bank(torch.nn.Module):
    """A module with a buffer that is not in its state_dict()."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.register_buffer("memory", torch.zeros(9000), persistent=False)


def decaying() -> Any:
    factor = [1.0]

    def decay(epoch: int) -> float:
        factor[0] *= 0.5
        return factor[0]

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, decay)


def weighted() -> Any:
    return DataLoader(range(9), sampler=WeightedRandomSampler(torch.ones(9), 9))


def in_memory() -> Any:
    database = sqlite3.connect(":memory:")
    database.execute("create table losses (loss)")
    return database


def hooked() -> Any:
    layer = torch.nn.Linear(2, 1)
    return layer, layer.register_forward_hook(lambda *_: None)


CASES: dict[str, Case] = {
    "numbers that processes share": (
        lambda: (mp.Value("i", 0), mp.Array("d", 3, lock=False)), lambda v: (setattr(v[0], "value", 5), v[1].__setitem__(1, 2.0)),
        lambda v: (v[0].value, list(v[1])),
    ),
    "rows of a namedtuple of the cell": (
        lambda: (Transition, []), lambda v: v[1].append(Transition(1, [2])), lambda v: (v[1], v[0].__name__),
    ),
    "a module whose hook stays": (hooked, lambda v: v[0].weight.data.fill_(3), lambda v: (v[0].weight, len(v[0]._forward_hooks))),
    "a bar that is moved by hand": (lambda: tqdm(total=9, file=io.StringIO()), lambda v: v.update(4), lambda v: v.n),
    "a database in memory": (
        in_memory, lambda v: v.execute("insert into losses values (1)"), lambda v: v.execute("select * from losses").fetchall(),
    ),
    "an event": (threading.Event, lambda v: v.set(), lambda v: v.is_set()),
    "an optimizer with attributes": (
        lambda: Lookahead([torch.nn.Parameter(torch.zeros(1))]), lambda v: v.step(), lambda v: (v.num_steps, v.slow),
    ),
    "a schedule whose function keeps something": (
        decaying, lambda v: (v.optimizer.step(), v.step()), lambda v: (v.get_last_lr(), v.lr_lambdas[0].__closure__[0].cell_contents),
    ),
    "a buffer that is not persistent": (Bank, lambda v: v.memory.__setitem__(8000, 1), lambda v: v.memory),
    "weights of a sampler in a loader": (weighted, lambda v: v.sampler.weights.__setitem__(3, 7), lambda v: v.sampler.weights),
    "a tensor of statistics, changed in three places": (lambda: torch.zeros(50_000), sparse, same),
    "an array of 200,000 rows": (lambda: np.zeros(200_000), sparse, same),
    "an array of records": (lambda: np.zeros(9000, [("a", "i4"), ("b", "f8")]), lambda v: v["b"].__setitem__(8000, 1), same),
    "an array of times": (lambda: np.zeros(9000, "datetime64[s]"), lambda v: v.__setitem__(7000, np.datetime64("2020")), same),
    "an array of objects": (lambda: np.array([None] * 300 + [[]], object), lambda v: v[300].append(1) or v.__setitem__(7, "x"), same),
    "a sparse tensor": (lambda: torch.eye(30).to_sparse(), lambda v: v.mul_(3), same),
    "a complex tensor": (lambda: torch.zeros(9000, dtype=torch.complex64), lambda v: v.__setitem__(77, 1j), same),
    "a bfloat16 tensor": (lambda: torch.zeros(90_000, dtype=torch.bfloat16), sparse, same),
    "a DataFrame": (
        lambda: pd.DataFrame({"a": np.zeros(9000), "b": ["x"] * 9000, "c": pd.Categorical(["u", "v"] * 4500)}),
        lambda v: (v.loc.__setitem__((8888, "a"), 7.0), v.loc.__setitem__((8889, "b"), "y"), v.loc.__setitem__((1, "c"), "u")),
        same,
    ),
    "a DataFrame that grows": (lambda: pd.DataFrame({"a": [1]}), lambda v: v.loc.__setitem__(9, [3]), same),
    "a Series with an index of times": (
        lambda: pd.Series(np.zeros(5000), index=pd.date_range("2020", periods=5000)), lambda v: v.iloc.__setitem__(4000, 1), same,
    ),
    "a list of 200,000": (lambda: [0] * 200_000, lambda v: v.__setitem__(123_456, 1), same),
    "an object with slots": (Slotted, lambda v: v.bump(), lambda v: v.both),
    "a dataclass with slots": (Record, lambda v: (setattr(v, "number", 3), v.names.append("a")), same),
    "a frozen dataclass": (Frozen, lambda v: object.__setattr__(v, "number", 4), same),
    "a histogram of an object": (Meter, lambda v: v.bins.__setitem__(999, 32), lambda v: v.bins),
    "an attribute of a class": (
        lambda: setattr(Registry, "count", 0) or Registry.known.clear() or Registry,
        lambda v: (setattr(v, "count", 8), v.known.update(a=1), setattr(v, "late", 2)),
        lambda v: (v.count, dict(v.known), v.late),
    ),
    "an attribute of a function": (lambda: setattr(counted, "calls", 0) or counted, lambda v: [v() for _ in range(8)], lambda v: v.calls),
    "a nonlocal of a closure": (closure, lambda v: [v() for _ in range(8)], lambda v: v()),
    "a default argument": (
        defaulting,
        lambda v: v.__defaults__[0].append(3), lambda v: v.__defaults__,
    ),
    "itertools.count": (lambda: itertools.count(3), lambda v: [next(v) for _ in range(8)], next),
    "an iterator of a list": (lambda: iter([1, 2, 3, 4]), lambda v: [next(v), next(v)], list),
    "a zip of iterators": (lambda: zip(itertools.count(), iter("abcdef"), strict=False), lambda v: [next(v), next(v)], list),
    "an enumerate": (lambda: enumerate(iter("abcdef")), lambda v: [next(v), next(v)], list),
    "an object in a dict of 300": (lambda: {n: Meter() for n in range(300)}, lambda v: setattr(v[222], "total", 8), lambda v: v[222].total),
    "a dict with keys of any kind": (lambda: {(1, "a"): 0, Mode.FAST: 0, Frozen(2): [0]}, lambda v: v[Frozen(2)].append(1), same),
    "a deque": (lambda: collections.deque([1], maxlen=3), lambda v: v.extend([2, 3, 4]), lambda v: (list(v), v.maxlen)),
    "a defaultdict": (lambda: collections.defaultdict(list), lambda v: v["a"].append(1), lambda v: (dict(v), v["new"])),
    "a Counter": (collections.Counter, lambda v: v.update("abca"), same),
    "an OrderedDict": (lambda: collections.OrderedDict(a=1, b=2), lambda v: v.move_to_end("a"), list),
    "a set": (lambda: {1}, lambda v: v.update({2, (3, "x")}), same),
    "a list of an own class": (OwnList, lambda v: (v.append(1), setattr(v, "limit", 5)), lambda v: (list(v), v.limit)),
    "a bytearray": (lambda: bytearray(90_000), lambda v: v.__setitem__(80_000, 7), same),
    "an array.array": (lambda: array.array("d", [0.0] * 10), lambda v: v.append(2.0), same),
    "a memoryview": (lambda: memoryview(bytearray(100)), lambda v: v.__setitem__(3, 9), bytes),
    "random.Random": (lambda: random.Random(3), lambda v: v.random(), lambda v: v.random()),
    "a generator of numpy": (lambda: np.random.default_rng(3), lambda v: v.random(), lambda v: v.random()),
    "a RandomState": (lambda: np.random.RandomState(3), lambda v: v.normal(), lambda v: v.normal()),
    "a generator of torch": (lambda: torch.Generator().manual_seed(2), lambda v: torch.rand(2, generator=v), lambda v: torch.rand(2, generator=v)),
    "a partial": (lambda: functools.partial(sparse, []), lambda v: v.args[0].append(1), lambda v: v.args),
    "a cache of any size": (lambda: functools.cache(lambda n: []), lambda v: v(3).append(1), lambda v: v(3)),
    "a buffer of text": (io.StringIO, lambda v: v.write("text"), lambda v: v.getvalue()),
    "threading.local": (threading.local, lambda v: setattr(v, "x", 3), lambda v: v.x),
    "a namespace": (types.SimpleNamespace, lambda v: setattr(v, "x", [3]), same),
    "a context variable": (lambda: CONTEXT.set(0) and CONTEXT, lambda v: v.set(8), lambda v: v.get()),
    "a module's buffers, persistent or not, and its attributes": (
        Memory, lambda v: (sparse(v.bank), sparse(v.kept), setattr(v, "calls", 8)), lambda v: (v.bank, v.kept, v.calls),
    ),
    "a list of modules that grows": (list, lambda v: v.append(torch.nn.Sequential(torch.nn.Linear(2, 2))), same),
    "a list of own objects that grows": (list, lambda v: v.append(Record(3, ["a"])), same),
    "a view of a dict": (lambda: ({"a": 1}, []), lambda v: (v[1].append(v[0].keys()), v[0].update(b=2)), lambda v: list(v[1][0])),
    "batches of a tokenizer that are kept": (
        list, lambda v: v.append(BatchEncoding({"input_ids": torch.ones(2)})), lambda v: (type(v[0]), v[0]["input_ids"]),
    ),
    "an error that was kept": (list, lambda v: v.append(ValueError("bad", 3)), lambda v: (type(v[0]), v[0].args)),
}  # fmt: skip
VALUES = {
    "a number": (1, 2), "a float": (0.1, -0.0), "a text": ("a", "b"), "None": (3, None), "a complex number": (1j, 2j),
    "a tuple": ((1, [2]), (1, [3])), "a decimal": (decimal.Decimal("1.1"), decimal.Decimal("1.10")),
    "a time": (datetime.datetime(2020, 1, 1), datetime.datetime(2021, 1, 1, tzinfo=datetime.UTC)),
    "a delta": (datetime.timedelta(1), datetime.timedelta(2)), "a path": (pathlib.Path("a"), pathlib.Path("b")),
    "a member": (Mode.FAST, Mode.SLOW), "a dtype": (torch.float32, torch.bfloat16), "a size": (torch.Size([1]), torch.Size([2, 3])),
    "a slice": (slice(1), slice(2, 3)), "a range": (range(3), range(1, 9, 2)), "a class": (Meter, Record), "a function": (sparse, same),
    "a numpy number": (np.float32(1), np.float32(2)), "a method of a list": ([].append, [1].append), "a frozenset": (frozenset(), frozenset({(1, 2)})),
    "an own frozen object": (Frozen(1), Frozen(2)), "a large integer": (1, 2**200), "a pattern": (re.compile("a"), re.compile("b+", re.I)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_has_changed_is_as_it_was(name: str) -> None:
    make, change, look = CASES[name]
    saved, undisturbed = saved_by(lambda: {"value": make()}, lambda names: change(names["value"]))
    wanted = copy.deepcopy(look(undisturbed["value"])) if "class" not in name else look(undisturbed["value"])
    assert equal(look(put(saved, {"value": make()})["value"]), wanted)


@pytest.mark.parametrize("name", VALUES)
def test_a_variable_that_is_bound_anew_has_its_new_value(name: str) -> None:
    first, second = VALUES[name]
    restored, _ = resumed(
        lambda: {"value": first, "other": second if callable(second) else 0}, lambda n: n.update(value=second)
    )
    assert type(restored["value"]) is type(second)
    assert restored["value"] == second or name == "a method of a list"
    assert repr(restored["value"]) == repr(second) or name == "a method of a list"


def test_a_path_has_the_hash_of_the_process_that_it_comes_back_to() -> None:
    def train(names: Names) -> None:
        path = pathlib.Path("b")
        path._hash = hash(path) + 1  # type: ignore[attr-defined] # as in another process: it keeps what it was asked for
        names["seen"][path] = 1

    saved, _ = saved_by(lambda: {"seen": {}}, train)
    assert put(saved, {"seen": {}})["seen"].get(pathlib.Path("b")) == 1


class Base:
    __slots__ = ("hidden", "kept")


class Heir(Base):
    """Has a property where the class above it has a slot, as pathlib's classes do."""

    __slots__ = ()

    @property
    def hidden(self) -> str:  # type: ignore[override]
        return "hidden"


def test_a_property_in_the_place_of_a_slot_is_no_attribute_that_is_taken_away() -> None:
    def train(names: Names) -> None:
        names["value"].kept = 2

    restored, _ = resumed(lambda: {"value": Heir()}, train)
    assert restored["value"].kept == 2


def test_objects_are_filled_in_place_so_that_everything_that_knows_them_sees_it() -> None:
    def make() -> Names:
        return {
            "list": [],
            "meter": Meter(),
            "tensor": torch.zeros(9000),
            "array": np.zeros(9000),
            "dict": {},
            "set": set(),
        }

    def train(names: Names) -> None:
        names["list"].append(1)
        names["meter"].total = 8
        names["tensor"][8000] = names["array"][8000] = 8
        names["dict"]["a"] = 1
        names["set"].add(1)

    saved, _ = saved_by(make, train)
    names = make()
    before = dict(names)
    put(saved, names)
    assert all(names[name] is before[name] for name in before)
    assert (before["list"], before["meter"].total, before["tensor"][8000], before["array"][8000]) == ([1], 8, 8, 8)


def test_what_is_one_object_stays_one_and_what_are_two_stay_two() -> None:
    def make() -> Names:
        shared: list[int] = []
        return {"a": shared, "b": shared, "c": [], "d": [], "meters": [Meter(), Meter()], "current": None}

    def train(names: Names) -> None:
        names["b"] = [1]
        names["d"] = names["c"]
        names["d"].append(2)
        names["current"] = names["meters"][1]
        names["current"].total = 5
        names["meters"].reverse()

    restored, undisturbed = resumed(make, train)
    assert restored["a"] is not restored["b"]
    assert restored["c"] is restored["d"]
    assert restored["current"] is restored["meters"][0]
    assert [meter.total for meter in restored["meters"]] == [meter.total for meter in undisturbed["meters"]] == [5, 0]


def test_views_go_on_sharing_memory() -> None:
    def make() -> Names:
        table, rows = torch.zeros(100, 100), np.zeros((100, 100))
        return {"table": table, "row": table[3], "column": table[:, 4], "rows": rows, "part": rows[10:20, ::2],
                "same": torch.from_numpy(rows), "late": None}  # fmt: skip

    def train(names: Names) -> None:
        names["row"] += 1
        names["part"] += 2
        names["late"] = names["table"][50:, 7]
        names["late"][3] = 9

    restored, undisturbed = resumed(make, train)
    for name, value in undisturbed.items():
        assert equal(restored[name], value), name
    restored["late"].fill_(4)
    restored["part"][:] = 5
    restored["row"][4] = 6
    assert torch.equal(restored["table"][50:, 7], torch.full((50,), 4.0))
    assert restored["column"][3] == 6
    assert restored["same"][10, 0] == 5


def test_a_cycle_comes_back_as_one() -> None:
    def make() -> Names:
        return {"node": {"children": []}}

    def train(names: Names) -> None:
        child = ({"parent": names["node"]}, names["node"]["children"])
        names["node"]["children"].append(child)

    restored, _ = resumed(make, train)
    child = restored["node"]["children"][0]
    assert child[0]["parent"] is restored["node"]
    assert child[1] is restored["node"]["children"]


def test_a_chain_of_a_thousand_objects_is_no_trouble() -> None:
    def make() -> Names:
        first: Names = {"next": None}
        last = first
        for _ in range(1000):
            last["next"] = {"next": None}
            last = last["next"]
        return {"first": first, "last": last}

    restored, _ = resumed(make, lambda names: names["last"].update(value=7))
    value, number = restored["first"], 0
    while value["next"] is not None:
        value, number = value["next"], number + 1
    assert (number, value["value"], value is restored["last"]) == (1000, 7, True)


def test_weak_references_lead_to_the_restored_object() -> None:
    def make() -> Names:
        meters = [Meter(), Meter()]
        return {"meters": meters, "best": weakref.ref(meters[0]), "all": weakref.WeakValueDictionary({"a": meters[0]})}

    def train(names: Names) -> None:
        names["best"] = weakref.ref(names["meters"][1])
        names["all"]["b"] = names["meters"][1]

    restored, _ = resumed(make, train)
    assert restored["best"]() is restored["meters"][1]
    assert restored["all"]["b"] is restored["meters"][1]


def test_members_of_an_enumeration_keep_their_attributes() -> None:
    Mode.FAST.seen = 0  # type: ignore[attr-defined]
    saved, _ = saved_by(lambda: {"mode": Mode}, lambda _: setattr(Mode.FAST, "seen", 8))
    Mode.FAST.seen = 0  # type: ignore[attr-defined]
    put(saved, {"mode": Mode})
    assert Mode.FAST.seen == 8  # type: ignore[attr-defined]


def test_a_value_with_a_lost_graph_says_so_when_one_goes_back_from_it() -> None:
    weight = torch.ones(3, requires_grad=True)
    restored, _ = resumed(lambda: {"loss": torch.zeros(())}, lambda names: names.update(loss=weight.sum() * 2))
    assert restored["loss"].item() == 6
    with pytest.raises(RuntimeError, match="holds its value but not the operations"):
        (restored["loss"] + weight.sum()).backward()


def test_a_trained_tensor_keeps_its_gradient_flag() -> None:
    restored, _ = resumed(lambda: {"w": torch.zeros(3, requires_grad=True)}, lambda n: n["w"].data.add_(1))
    assert restored["w"].requires_grad
    assert restored["w"].is_leaf
    assert restored["w"].tolist() == [1, 1, 1]


def test_a_file_is_read_on_where_it_was(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "text"
    path.write_text("abcdefgh")
    restored, _ = resumed(lambda: {"file": path.open()}, lambda names: names["file"].read(3))
    assert restored["file"].read() == "defgh"


# --- what cannot be saved --------------------------------------------------------------------------------------------


def numbers() -> Any:
    yield from range(9)


def written(path: pathlib.Path) -> Any:
    return (path / "log").open("w")


REFUSED: dict[str, Case] = {
    "a hook that is removed": (hooked, lambda v: v[1].remove(), same),
    "a hook that is added": (hooked, lambda v: v[0].register_forward_pre_hook(lambda *_: None), same),
    "a generator": (numbers, next, same),
    "a generator expression": (lambda: (n for n in [1, 1, 1]), next, same),
    "a map over a generator": (lambda: map(abs, numbers()), next, same),
    "a cache of limited size": (lambda: functools.lru_cache(lambda n: []), lambda v: v(3), same),
    "a function made in the loop": (list, lambda v: v.append(lambda: 3), same),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_by_name_with_the_way_out(name: str) -> None:
    make, change, _ = REFUSED[name]
    with pytest.raises(NotPlain, match=r"'things.*' is or holds a?.*run\.checkpoint\(name=\.\.\.\)"):
        saved_by(lambda: {"things": make()}, lambda names: change(names["things"]))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_and_has_not_changed_is_no_trouble(name: str) -> None:
    make, *_ = REFUSED[name]
    restored, _ = resumed(lambda: {"things": make(), "x": 0}, lambda names: names.update(x=1))
    assert restored["x"] == 1


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [4, 100_000])
def test_a_sharded_tensor_is_no_trouble_until_it_is_written_to(mesh: DeviceMesh, size: int) -> None:
    def make() -> Names:
        return {"weight": DTensor.from_local(torch.zeros(size), mesh, [Shard(0)]), "x": 0}

    def write(names: Names) -> None:
        names["weight"].to_local()[-1] = 1

    restored, _ = resumed(make, lambda names: names.update(x=1))
    assert restored["x"] == 1 and isinstance(restored["weight"], DTensor)
    with pytest.raises(NotPlain, match="'weight' is or holds a sharded tensor that no optimizer trains"):
        saved_by(make, write)
    with pytest.raises(NotPlain, match=r"'weight.*sharded tensor"):
        saved_by(make, lambda names: names.update(weight=names["weight"] + 1))


def test_a_mapped_file_that_is_only_read_is_not_looked_through(tmp_path: pathlib.Path) -> None:
    np.zeros(1 << 20, np.uint16).tofile(tmp_path / "train.bin")
    data = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    saved, _ = saved_by(lambda: {"data": data, "part": data[:10]}, lambda names: None)
    assert sum(node["head"][0] for node in saved["nodes"].values() if node["kind"] == "memory") < 1 << 10
    assert put(saved, {"data": data, "part": data[:10]})["data"] is data


def test_a_file_that_was_written_to_is_refused_one_that_is_appended_to_is_not(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NotPlain, match="'file' is or holds a file that was written to"):
        saved_by(lambda: {"file": (tmp_path / "log").open("w")}, lambda names: names["file"].write("text"))
    resumed(lambda: {"file": (tmp_path / "log").open("a")}, lambda names: names["file"].write("text"))


def test_what_was_made_from_other_numbers_than_before_is_missed_not_used() -> None:
    saved, _ = saved_by(lambda: {"data": torch.zeros(50_000), "x": 0}, lambda names: names.update(x=1))
    with pytest.raises(ResumeMissed, match=r"'data.*Seed the random numbers"):
        put(saved, {"data": torch.ones(50_000), "x": 0})


def test_what_was_not_saved_says_so_at_any_use() -> None:
    lost = NotSaved("a large batch")
    for use in (
        lambda: lost + 1,
        lambda: torch.zeros(1) + lost,
        lambda: lost.shape,
        lambda: bool(lost),
        lambda: lost[0],
    ):
        with pytest.raises(RuntimeError, match="held a large batch, which is not part of a checkpoint"):
            use()


def test_a_large_tensor_is_compared_while_it_is_written_and_saved_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyter_llmcloud.training.object_graph import state as object_state
    from jupyter_llmcloud.training.object_graph.state import ObjectState
    from tests.support.object_graphs import graph_of

    monkeypatch.setattr(object_state, "MAX_AT_ONCE", 100_000)
    names, state = {"big": torch.zeros(50_000)}, ObjectState()
    state.remember(graph_of(names, state.known), set())
    names["big"][49_999] = 1
    take = lambda: state.take(graph_of(names, state.known), set(), lambda _, t: t.clone(), 0)  # noqa: E731
    assert "bytes" not in take()["nodes"]["0 big<memory>"]
    [compare] = state.later
    assert compare.has_changed()
    state.note_changed([compare.address])
    assert "bytes" in take()["nodes"]["0 big<memory>"]
    assert state.later == []


class Metric(torch.nn.Module):
    """As those of torchmetrics: what it counts by is a wrapper round a method, which its state leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())
        self.count = self._wrapped(self.count)  # type: ignore[method-assign]

    def _wrapped(self, method: Callable[[float], None]) -> Callable[[float], None]:
        @functools.wraps(method)
        def counted(value: float) -> None:
            self.num_calls = getattr(self, "num_calls", 0) + 1
            method(value)

        return counted

    def count(self, value: float) -> None:
        self.total = self.total + value

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "count"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.count = self._wrapped(self.count)  # type: ignore[method-assign]


def test_metrics_that_a_training_has_added_count_on() -> None:
    def make() -> Names:
        return {"base": Metric(), "each": []}

    def train(names: Names) -> None:
        names["base"].count(1.0)
        for number in range(2):
            names["each"].append(copy.deepcopy(names["base"]))
            names["each"][-1].count(float(number))

    again, undisturbed = resumed(make, train)
    for names in again, undisturbed:
        names["each"][0].count(5.0)
        names["base"].count(7.0)
        assert [float(metric.total) for metric in names["each"]] == [6.0, 2.0]
        assert [metric.num_calls for metric in names["each"]] == [3, 2]
        assert (float(names["base"].total), names["base"].num_calls) == (8.0, 2)
