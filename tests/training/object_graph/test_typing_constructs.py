"""What `typing` makes is in every cell of somebody who annotates: it is no state, and it is never in the way."""

# ruff: noqa: UP006, UP007, UP035, UP045 - what typing has for older code is what is tested

from __future__ import annotations

import collections.abc
import sys
import typing
from typing import (
    Annotated,
    Any,
    Callable,
    ClassVar,
    Concatenate,
    Dict,
    ForwardRef,
    Generic,
    List,
    Literal,
    NewType,
    Optional,
    ParamSpec,
    Tuple,
    TypeVar,
    TypeVarTuple,
    Union,
    Unpack,
)

import pytest

from tests.support.object_graphs import Names, resumed

T = TypeVar("T")
P = ParamSpec("P")
Ts = TypeVarTuple("Ts")


class Box(Generic[T]):
    def __init__(self, item: T) -> None:
        self.item = item


# Each is equal to another one that is made of the same.
ALIASES: dict[str, Any] = {
    "of a built-in class": list[int],
    "of a built-in class, nested": dict[str, list[tuple[int, ...]]],
    "of typing": List[int],
    "of typing, nested": Dict[str, Tuple[int, ...]],
    "a union": int | None,
    "a union of typing": Union[int, str],
    "optional": Optional[int],
    "a callable": Callable[[int, str], None],
    "a callable of collections.abc": collections.abc.Callable[[int], str],
    "a callable with a ParamSpec": Callable[P, int],
    "a callable with another argument": Callable[Concatenate[int, P], int],
    "of an own class": Box[int],
    "of an own class and a type variable": Box[T],
    "annotated": Annotated[int, "in seconds"],
    "literal": Literal["a", 1, None],
    "of a class variable": ClassVar[int],
    "unpacked": Unpack[Ts],
    "an unpacked tuple": next(iter(tuple[int, str])),
    "a form of typing": Union,
    "a list of typing": List,
    "the name of a type": ForwardRef("Later"),
    "the arguments of a ParamSpec": P.args,
    "the keyword arguments of a ParamSpec": P.kwargs,
}
PARAMETERS: dict[str, Callable[[], Any]] = {
    "TypeVar": lambda: TypeVar("V"),
    "TypeVar with a bound": lambda: TypeVar("V", bound=Box[int]),
    "TypeVar with a bound that is a name": lambda: TypeVar("V", bound="Later"),  # noqa: F821
    "TypeVar with constraints": lambda: TypeVar("V", int, str),
    "TypeVar that is covariant": lambda: TypeVar("V", covariant=True),
    "ParamSpec": lambda: ParamSpec("V"),
    "TypeVarTuple": lambda: TypeVarTuple("V"),
}


def base() -> Names:
    return {"T": T, "P": P, "Ts": Ts, "Box": Box, "kind": list[float], "steps": [0]}


def described(value: Any) -> list[Any]:
    names = (
        "__name__",
        "__bound__",
        "__constraints__",
        "__covariant__",
        "__contravariant__",
        "__module__",
        "__default__",
    )
    return [type(value), repr(value), *(getattr(value, name, None) for name in names)]


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_an_alias_of_the_cell_is_there_after_a_resume(alias: Any) -> None:
    again, before = resumed(lambda: {**base(), "kind": alias}, lambda names: names["steps"].append(1))
    assert (again["kind"], again["steps"]) == (before["kind"], [0, 1])


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_an_alias_that_a_loop_has_made_is_made_again(alias: Any) -> None:
    again, before = resumed(base, lambda names: names.update(kind=alias, new=[alias]))
    assert type(again["kind"]) is type(alias)
    assert (again["kind"], again["new"]) == (before["kind"], before["new"]) == (alias, [alias])


@pytest.mark.parametrize("make", PARAMETERS.values(), ids=PARAMETERS)
def test_a_type_parameter_of_the_cell_is_there_after_a_resume(make: Callable[[], Any]) -> None:
    own = make()
    again, _ = resumed(lambda: {**base(), "V": own}, lambda names: names["steps"].append(1))
    assert again["V"] is own


@pytest.mark.parametrize("make", PARAMETERS.values(), ids=PARAMETERS)
def test_a_type_parameter_that_a_loop_has_made_is_made_again_once(make: Callable[[], Any]) -> None:
    def train(names: Names) -> None:
        names["V"] = make()
        names["also"] = [names["V"]]

    again, before = resumed(base, train)
    assert described(again["V"]) == described(before["V"])
    assert again["also"][0] is again["V"]


def test_a_new_type_that_a_loop_has_made_is_made_again() -> None:
    again, before = resumed(base, lambda names: names.update(Id=NewType("Id", int)))
    assert (again["Id"].__name__, again["Id"].__module__, again["Id"].__supertype__) == ("Id", __name__, int)
    assert again["Id"](3) == before["Id"](3)


def test_objects_of_a_generic_class_are_as_they_were() -> None:
    def make() -> Names:
        return {**base(), "box": Box[int](3), "Boxes": dict[str, Box[T]]}

    again, _ = resumed(make, lambda names: setattr(names["box"], "item", 4))
    assert (again["box"].item, again["box"].__orig_class__) == (4, Box[int])


def test_what_typing_gives_to_all_is_never_filled_with_something_else() -> None:
    """`List[int]` is one object in a process: what takes its place is another one."""
    again, _ = resumed(
        lambda: {**base(), "kind": List[int], "form": List},
        lambda names: names.update(kind=List[str], form=Dict),
    )
    assert (again["kind"], again["form"]) == (List[str], Dict)
    assert repr([List[int], List, Dict]) == "[typing.List[int], typing.List, typing.Dict]"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs the syntax of Python 3.12")
def test_what_is_written_in_brackets_is_no_trouble() -> None:
    source = (
        "type Tree = dict[str, Tree]\ntype Pair[K] = tuple[K, K]\n"
        "def first[K: Later](pair: tuple[K, K]) -> K:\n    known = K\n    return (pair[0], known)[0]\n"
        "class Stack[K]:\n    kinds = [K]\n    def push(self, item: K) -> K: return item\n"
        "stack, steps = Stack[int](), [0]\n"
    )

    def make() -> Names:
        names: Names = {"__name__": __name__}
        exec(source, names)
        return {name: value for name, value in names.items() if not name.startswith("__")}

    again, _ = resumed(make, lambda names: names["steps"].append(1))
    assert (again["steps"], again["first"]((3, 4)), again["stack"].push(5)) == ([0, 1], 3, 5)
    assert repr(again["Tree"].__value__) == "dict[str, Tree]"


@pytest.mark.skipif(not hasattr(typing, "NoDefault"), reason="needs the defaults of Python 3.13")
def test_a_type_parameter_keeps_its_default() -> None:
    again, _ = resumed(base, lambda names: names.update(V=TypeVar("V", default=int)))  # type: ignore[call-arg]
    assert again["V"].__default__ is int
