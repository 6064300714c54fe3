"""What is under way: generators that wait, passes over loaders, iterators that a running loop draws from.

What is led back by the replay of the cell is found where it stood and left as it is. A generator cannot be advanced to
a place: one that is not led there is refused when it has moved.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.object_graph.kinds.base import SIMPLE, Child, Kind, Untouched
from jupyter_llmcloud.training.resume.loaders.iterator import TrackedIterator
from jupyter_llmcloud.training.resume.loaders.source import AdvancedBase
from jupyter_llmcloud.training.resume.loops.tracking import TrackedLoop
from jupyter_llmcloud.training.resume.user_code import is_own_module

_STANDARD = frozenset({"builtins", "itertools"})
_MAX_LOOKS = 200
_MANY = 1000  # items of a container that a data set reads from
Generator = types.GeneratorType | types.CoroutineType | types.AsyncGeneratorType


class Followed(Untouched):
    """What comes back by the replay of the cell, or is saved in another way: a pass over a loader, a trained tensor."""

    name = "followed"
    led = True


class Rows(Followed):
    """A long container that a data set reads from: what it holds is taken as read and never changed."""

    name = "rows"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [len(value)], []


class SuspendedGenerator(Untouched):
    """A generator, which waits at some place in its code."""

    name = "generator"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        frame = frame_of(value)
        if frame is None:
            return ["ended"], []
        names, children = _named(frame.f_locals)
        return [frame.f_lasti, names, _positions(value)], [*children, ("<code>", frame.f_code)]

    def refusal(self, head: Any) -> str:
        return "a generator that has been advanced, which no checkpoint can hold"


class InLoop(SuspendedGenerator):
    """A generator that a running loop draws from: the loop leads it to where it was, or it is missed."""

    name = "generator in a loop"
    led = True

    def refusal(self, head: Any) -> str:
        return ""

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        now, items = self.split(value)
        same = all(
            new is old or (type(old) in SIMPLE and new == old) for (_, old), new in zip(items, children, strict=False)
        )
        if now != head or not same:
            raise ResumeMissed(f"the generator {value.__name__} is not where it was: it is drawn from beside its loop.")


class Delivering(Untouched):
    """A generator of the user's that draws from a loader that is followed: its variables come back when it goes on."""

    name = "delivering generator"
    led = True

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        frame = frame_of(value)
        if frame is None or value.gi_running:
            return [value.__name__, []], []
        names, children = _named({n: item for n, item in frame.f_locals.items() if not n.startswith("__llmcloud")})
        return [value.__name__, names], children


FOLLOWED, ROWS, WAITING, IN_LOOP, DELIVERING = Followed(), Rows(), SuspendedGenerator(), InLoop(), Delivering()


def frame_of(value: Any) -> Any:
    """Where a generator or coroutine waits; None when it has ended."""
    return getattr(value, "gi_frame", None) or getattr(value, "cr_frame", None) or getattr(value, "ag_frame", None)


def _named(variables: Mapping[str, Any]) -> tuple[list[str], list[Child]]:
    """The names of variables, and their values as children."""
    return list(variables), [(f"<{name}>", item) for name, item in variables.items()]


def kind_of_generator(value: Any) -> Kind:
    """How a generator comes back."""
    if not isinstance(value, types.GeneratorType) or not draws_from_loader(value):
        return WAITING
    own = is_own_module(str(value.gi_frame.f_globals.get("__name__"))) if value.gi_frame is not None else False
    return DELIVERING if own else FOLLOWED


def draws_from_loader(value: Any) -> bool:
    """Whether a pass over a loader that is followed is inside an iterator."""
    pending, seen = [value], set[int]()
    while pending and len(seen) < _MAX_LOOKS:
        item = pending.pop()
        if isinstance(item, TrackedIterator | AdvancedBase):
            return True
        if id(item) in seen or not _may_lead(item):
            continue
        seen.add(id(item))
        pending += gc.get_referents(item)
    return False


def _may_lead(item: Any) -> bool:
    if isinstance(item, Generator | TrackedLoop | tuple):
        return True
    return isinstance(item, Iterator) and type(item).__module__ in _STANDARD


def rows_of(loaders: list[Any]) -> dict[int, Kind]:
    """The long containers from which these loaders' data sets read, by id."""
    found: dict[int, Kind] = {}
    pending = [getattr(loader, "dataset", None) for loader in loaders]
    for _ in range(_MAX_LOOKS):
        if not pending:
            break
        item = pending.pop()
        if isinstance(item, list | tuple | dict):
            if len(item) > _MANY and not SIMPLE.issuperset(
                map(type, item.values() if isinstance(item, dict) else item)
            ):
                found[id(item)] = ROWS
        elif isinstance(item, Dataset):
            pending += [part for part in vars(item).values() if isinstance(part, list | tuple | dict | Dataset)]
    return found


def _positions(value: Any, depth: int = 0) -> list[int]:
    """How far the iterators are that something draws from, also those without a name."""
    found: list[int] = []
    for item in gc.get_referents(value):
        if isinstance(item, Iterator) and not hasattr(item, "gi_frame") and type(item).__module__ in _STANDARD:
            try:
                reduced: Any = item.__reduce__()
                _, arguments, *state = reduced
            except Exception:
                arguments, state = (), []
            found += [number for number in (*arguments, *state) if type(number) is int]
            found += _positions(item, depth + 1) if depth < 6 else []
    return found
