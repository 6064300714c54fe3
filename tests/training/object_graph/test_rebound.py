"""A name that the training binds to something else: restored as that, or refused by name, never left as it was."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import multiprocessing
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from jupyter_llmcloud.training.checkpoint.serialization import NotPlain
from jupyter_llmcloud.training.object_graph.graph import Identities
from jupyter_llmcloud.training.object_graph.kinds import arrow
from jupyter_llmcloud.training.resume.cell.context import by_first_names
from tests.support.object_graphs import Names, graph_of, resumed

COLUMNS = {"n": [1, 2, None], "text": ["a", None, "ü"], "list": [[1.5], [], None]}
DICTIONARY = pa.array(["x", "y", "x"]).dictionary_encode()
VALUES: dict[str, Callable[[], Any]] = {
    "a table": lambda: pa.table(COLUMNS),
    "a part of a table": lambda: pa.table(COLUMNS).slice(1, 1),
    "a table of chunks": lambda: pa.concat_tables([pa.table(COLUMNS), pa.table(COLUMNS)]),
    "a table without rows": lambda: pa.table({"n": pa.array([], pa.int8())}),
    "a table with metadata": lambda: pa.table(COLUMNS).replace_schema_metadata({"k": "v"}),
    "a table with a dictionary": lambda: pa.table({"d": DICTIONARY}),
    "a batch": lambda: pa.RecordBatch.from_pydict(COLUMNS),
    "a batch without rows": lambda: pa.RecordBatch.from_pydict({"n": pa.array([], pa.int8())}),
    "an array": lambda: pa.array([1, None]),
    "a value": lambda: pa.scalar(3, pa.timestamp("ns", "UTC")),
    "a value that is missing": lambda: pa.scalar(None, pa.list_(pa.int8())),
    "a schema": lambda: pa.schema([("n", pa.int32())], {"k": "v"}),
    "a field": lambda: pa.field("n", pa.int32(), nullable=False),
}


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_arrow_is_the_one_that_it_was_bound_to(name: str) -> None:
    make = VALUES[name]

    def train(names: Names) -> None:
        names["value"] = make()
        names["holder"].value = make()

    restored, _ = resumed(lambda: {"value": pa.table({"other": [0]}), "holder": Holder(pa.scalar(1))}, train)
    for found in (restored["value"], restored["holder"].value):
        assert type(found) is type(make()) and found.equals(make())
        assert getattr(found, "schema", pa.schema([])).metadata == getattr(make(), "schema", pa.schema([])).metadata


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_arrow_that_is_as_it_was_is_no_trouble(name: str) -> None:
    restored, _ = resumed(lambda: {"value": VALUES[name](), "x": 0}, lambda names: names.update(x=1))
    assert restored["x"] == 1 and restored["value"].equals(VALUES[name]())


def large(factor: int = 1) -> pa.Table:
    return pa.table({"n": torch.arange(200_000).mul(factor).numpy()})


def test_a_large_table_is_refused_when_it_is_another_and_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(
        arrow, "_write", lambda table, sink, write=arrow._write: (read.append(len(table)), write(table, sink))
    )
    restored, _ = resumed(lambda: {"rows": large(), "x": 0}, lambda names: names.update(x=1))
    assert restored["x"] == 1 and restored["rows"].equals(large())
    assert read == [200_000, 200_000]  # that of each process
    with pytest.raises(NotPlain, match="'rows' is or holds a table of Arrow of more than"):
        resumed(lambda: {"rows": large()}, lambda names: names.update(rows=large(2)))
    monkeypatch.setattr(arrow, "_READ", 0)
    with pytest.raises(NotPlain, match="'rows' is or holds a table of Arrow of more than"):
        resumed(lambda: {"rows": large()}, lambda names: names.update(rows=large(3)))


# Whose successors look the same to whoever does not compare them. (first, then)
REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "a function without a name": (lambda: lambda x: x, lambda: lambda x: 2 * x),
    "a generator": (lambda: (x for x in (1, 2)), lambda: (2 * x for x in (1, 2))),
    "what comes later": (lambda: ThreadPoolExecutor(1).submit(int), lambda: ThreadPoolExecutor(1).submit(str)),
}


@pytest.mark.parametrize("where", ["a variable", "an attribute", "an item"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused_when_it_is_another(name: str, where: str) -> None:
    first, then = REFUSED[name]

    def train(names: Names) -> None:
        if where == "a variable":
            names["things"] = then()
        elif where == "an attribute":
            names["things"].value = then()
        else:
            names["things"][0] = then()

    made = {"a variable": first, "an attribute": lambda: Holder(first()), "an item": lambda: [first()]}[where]
    with pytest.raises(NotPlain, match=r"'things.*' is or holds a.*run\.checkpoint\(name=\.\.\.\)"):
        resumed(lambda: {"things": made()}, train)
    restored, _ = resumed(lambda: {"things": made(), "x": 0}, lambda names: names.update(x=1))
    assert restored["x"] == 1


def test_a_signature_that_the_training_has_made_comes_back() -> None:
    def train(names: Names) -> None:
        names["kept"].append(inspect.signature(large))
        names["proxy"] = types.MappingProxyType({"a": [1]})

    restored, _ = resumed(lambda: {"kept": [inspect.signature(doubled)], "proxy": vars(Holder)}, train)
    assert restored["kept"] == [inspect.signature(doubled), inspect.signature(large)]
    assert restored["proxy"] == {"a": [1]} and type(restored["proxy"]) is types.MappingProxyType


def doubled(x: int) -> int:
    return 2 * x


def test_a_function_that_each_round_makes_anew_is_no_trouble() -> None:
    def make() -> Names:
        return {"step": closure(0), "act": doubled}

    def closure(at: int) -> Callable[[], int]:
        return lambda: at

    restored, _ = resumed(make, lambda names: names.update(step=closure(3)))
    assert restored["step"]() == 3 and restored["act"] is doubled


def test_a_model_goes_by_the_name_that_it_had_when_the_training_began() -> None:
    names: Names = {"q2": torch.nn.Linear(1, 1), "kept": [torch.nn.Linear(1, 1)]}
    known = Identities()
    for entry in graph_of(names, known).entries.values():
        known.add(entry)
    names = {"a": names["kept"][0], "q": names["q2"], **names, "new": torch.nn.Linear(1, 1)}  # as loops bind them
    graph = graph_of(names, known)
    table = {f"variable {path}": value for path, value in graph.paths.items() if isinstance(value, torch.nn.Module)}
    assert by_first_names(table | {"accelerator 0": names["q2"]}, graph) == {
        "variable 0 q2": names["q2"],
        "variable 0 kept[0]": names["kept"][0],
        "variable 0 new": names["new"],
        "accelerator 0": names["q2"],
    }


# --- what a cell attaches to objects of libraries --------------------------------------------------------------------


class Own(DataLoader):  # type: ignore[type-arg]
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rounds = 0


def optimizer() -> Any:
    found = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    return found


ROWS = TensorDataset(torch.zeros(4))
GIVEN: dict[str, Callable[[], Any]] = {
    "a loader": lambda: DataLoader(ROWS),
    "a loader of a class of one's own": lambda: Own(ROWS),
    "an optimizer": optimizer,
    "a schedule": lambda: torch.optim.lr_scheduler.StepLR(optimizer(), 1),
    "a thread": threading.Thread,
    "a logger": lambda: logging.Logger("of its own"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_attributes_that_a_cell_gives_to_an_object_of_a_library_come_back(name: str) -> None:
    def make() -> Names:
        made = GIVEN[name]()
        made.rounds, made.seen = 0, []
        return {"thing": made}

    def train(names: Names) -> None:
        names["thing"].rounds += 1
        names["thing"].seen.append(3)
        names["thing"].best = torch.ones(1)

    restored, _ = resumed(make, train)
    thing = restored["thing"]
    assert (thing.rounds, thing.seen, thing.best) == (1, [3], torch.ones(1))


def test_a_sampler_inside_a_loader_keeps_what_a_cell_gives_to_it() -> None:
    def make() -> Names:
        sampler = DistributedSampler(ROWS, 1, 0)
        sampler.seen = 0
        return {"loader": DataLoader(ROWS, sampler=sampler)}

    def train(names: Names) -> None:
        names["loader"].sampler.seen += 1

    restored, _ = resumed(make, train)
    assert restored["loader"].sampler.seen == 1


# --- objects that are looked for by their id() -----------------------------------------------------------------------


def test_the_ids_that_a_cell_has_kept_are_those_that_its_objects_have_now() -> None:
    def make() -> Names:
        layer = torch.nn.Linear(2, 1)
        known = [id(p) for p in layer.parameters()]
        return {"layer": layer, "known": known, "seen": {}, "one": 0, "holder": Holder(None), "far": 1 << 60}

    def train(names: Names) -> None:
        for name, parameter in names["layer"].named_parameters():
            names["seen"][id(parameter)] = name
            names["seen"][name, id(parameter)] = {id(parameter)}
            names["one"] = names["holder"].value = id(parameter)

    restored, _ = resumed(make, train)
    ids = [id(p) for p in restored["layer"].parameters()]
    assert restored["known"] == ids and restored["one"] == restored["holder"].value == ids[-1]
    names = ["weight", "bias"]
    assert restored["seen"] == {
        **dict(zip(ids, names, strict=True)), **{(name, at): {at} for name, at in zip(names, ids, strict=True)}
    }  # fmt: skip
    assert restored["far"] == 1 << 60


# --- what is kept beside the objects of Python -----------------------------------------------------------------------


def test_what_a_manager_keeps_in_its_process_comes_back() -> None:
    with (
        multiprocessing.get_context("fork").Manager() as manager,
        multiprocessing.get_context("fork").Manager() as other,
    ):
        managers = iter([manager, other])

        def make() -> Names:
            of = next(managers)
            return {"counts": of.dict(n=0), "seen": of.list([0]), "best": of.Value("i", 9)}

        def train(names: Names) -> None:
            names["counts"]["n"] += 1
            names["seen"].append(3)
            names["best"].value = 2

        restored, _ = resumed(make, train)
        assert dict(restored["counts"]) == {"n": 1} and list(restored["seen"]) == [0, 3]
        assert restored["best"].value == 2


def test_what_waits_in_a_queue_of_asyncio_comes_back() -> None:
    restored, _ = resumed(lambda: {"queue": asyncio.Queue[int]()}, lambda names: names["queue"].put_nowait(3))
    assert restored["queue"].get_nowait() == 3


def second(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return 2 * torch.nn.functional.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize(
    "bind", [lambda layer: types.MethodType(second, layer), lambda layer: functools.partial(second, layer)]
)
def test_a_module_whose_forward_a_cell_has_exchanged_goes_on_with_that(bind: Callable[[Any], Any]) -> None:
    layers = [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]
    left = iter(layers)
    resumed(
        lambda: {"layer": next(left), "second": second},
        lambda names: setattr(names["layer"], "forward", bind(names["layer"])),
    )
    assert torch.equal(layers[0](torch.ones(1)), layers[1](torch.ones(1)))


@pytest.mark.parametrize(
    "value",
    [torch.channels_last, torch.per_channel_affine, torch.finfo(torch.float16), torch.iinfo(torch.int8)],
    ids=str,
)
def test_a_constant_of_torch_is_the_one_that_it_was_bound_to(value: Any) -> None:
    restored, _ = resumed(lambda: {"value": torch.contiguous_format}, lambda names: names.update(value=value))
    assert restored["value"] == value
