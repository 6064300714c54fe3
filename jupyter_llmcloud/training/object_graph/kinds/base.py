"""How objects are taken apart and put together again: one `Kind` for everything that is stored alike.

A kind splits an object into a head (plain data) and named children (other objects); it makes an empty object, or builds
a whole one from its children, and fills an object that is there with other contents. Nothing here runs code of a file:
classes must be loaded already, objects are made without their constructors, and what pickle would call is called only
when it is known to construct and do nothing else.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterable
from typing import Any

from torch.distributed.fsdp import FSDPModule

from jupyter_llmcloud.training.object_graph.memory import Region

SIMPLE = frozenset({int, float, str, bytes, bool, type(None)})
Child = tuple[str, Any]  # what leads to it, for people to read; itself
# Classes that say of themselves that they are in builtins, where they have no name: that of None, of functions.
_WITHOUT_NAME = {
    found.__qualname__: found for found in vars(types).values()
    if isinstance(found, type) and found.__module__ == "builtins"
}  # fmt: skip


class CannotSave(TypeError):
    """An object that cannot be saved exactly; says what it is."""


class Kind:
    """What is stored alike.

    Attributes:
        name: in the file.
        filled: it can be filled in place, so that others who know the object see its new contents.
        made: a new one can be made from the file.
        kept: its parts are objects that are there for longer than it is being looked at.
        led: it comes back by itself when the cell is executed again, or is saved in another way.
    """

    name = ""
    filled = True
    made = True
    kept = True
    led = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        """(head, children)."""
        raise NotImplementedError

    def unsaved_memory(self, value: Any) -> Region | None:
        """Its only child, where that is memory which no file brings back: it must be as it was."""
        return None

    def make(self, cls: Any, head: Any) -> Any:
        """An empty one."""
        return cls.__new__(cls)

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        """Give it these contents."""
        raise NotImplementedError

    def own(self, head: Any, items: list[Any]) -> tuple[Any, list[Any]]:
        """Head and items without what may be attached to one that is there, where such a kind is not filled."""
        return head, items

    def attach(self, value: Any, head: Any, children: list[Any]) -> None:
        """Give one that is there, and is like the saved one, what is attached to it."""

    def refusal(self, head: Any) -> str:
        """Why one that has changed to this cannot be saved; "" when it can."""
        return ""

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        """A whole one, of a kind that is not filled."""
        raise CannotSave(f"a {cls.__name__} cannot be made from a file")


def name_of(cls: Any) -> str:
    """The name under which a class or a function is found again."""
    if isinstance(cls, type) and FSDPModule in cls.__bases__:  # which fully_shard makes anew of the plain one
        cls = cls.__bases__[-1]
    return f"{cls.__module__}:{cls.__qualname__}"


def find(name: str) -> Any:
    """The class or function of this name; only of modules that are loaded."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return _WITHOUT_NAME.get(path) if found is None and module == "builtins" else found


def is_plain(items: Iterable[Any]) -> bool:
    """Whether every item is a number, a text or None."""
    return SIMPLE.issuperset(map(type, items))


def attributes(value: Any) -> list[Child]:
    """Those that an object has of its own, in its __dict__ and in slots."""
    found = list(vars(value).items()) if hasattr(value, "__dict__") else []
    for name, slot in slots(type(value)).items():
        try:
            found.append((name, slot.__get__(value)))
        except AttributeError:
            continue
    return [(name, item) for name, item in found if isinstance(name, str)]


def slots(cls: type) -> dict[str, Any]:
    """The slots of a class and those above it, by the names under which they are stored."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            stored = (
                f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            )
            if stored not in ("__dict__", "__weakref__") and (slot := vars(base).get(stored)) is not None:
                found.setdefault(stored, slot)
    return found


def set_attributes(value: Any, names: list[str], items: list[Any]) -> None:
    """Give an object exactly these attributes, whatever its class does about setting some."""
    known, mine = slots(type(value)), vars(value) if hasattr(value, "__dict__") else {}
    for name in [name for name in mine if isinstance(name, str) and name not in names and not is_hidden(value, name)]:
        del mine[name]
    for name, slot in known.items():
        if name not in names:
            with contextlib.suppress(AttributeError):  # not `hasattr`: a property of an heir may hide an empty slot
                slot.__delete__(value)
    for name, item in zip(names, items, strict=True):
        if name in known:
            known[name].__set__(value, item)
        else:
            mine[name] = item


def is_hidden(value: Any, name: str) -> bool:
    """An attribute that belongs to our own machinery."""
    return name.startswith("__llmcloud") or name == "_llmcloud_number"


def visible(value: Any) -> list[Child]:
    """The attributes that are looked at."""
    return [(name, item) for name, item in attributes(value) if not is_hidden(value, name)]


class Untouched(Kind):
    """What is left as it is there, and never made from a file."""

    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        """It stays as it is."""


class Fixed(Untouched):
    """What is no state of a training: a connection, a lock, a tokenizer. The cell makes it again."""

    name = "fixed"


class Unsaved(Kind):
    """What cannot be saved, and not even compared."""

    name = "unsaved"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        raise CannotSave(f"a {type(value).__module__}.{type(value).__name__}")
