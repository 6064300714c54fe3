"""Lists, sets, dicts and their like, with those that hold weak references."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

from jupyter_llmcloud.training.object_graph import set_order
from jupyter_llmcloud.training.object_graph.kinds.base import SIMPLE, Child, Kind, is_plain, set_attributes, visible


class Container(Kind):
    """A list, a set, ...; of a subclass with its attributes."""

    def __init__(self, base: type, opening: str = "[", closing: str = "]", filled: bool = True) -> None:
        self.base, self.name, self.filled = base, base.__name__, filled
        self._brackets = opening, closing

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = [] if type(value) is self.base else visible(value)
        iterate: Any = self.base.__iter__  # type: ignore[attr-defined]
        items = list(iterate(value))
        names = [name for name, _ in own]
        if is_plain(items):
            return [self.extra(value), items, names], [(f".{name}", item) for name, item in own]
        left, right = self._brackets
        children = [(f"{left}{at}{right}", item) for at, item in enumerate(items)]
        return [self.extra(value), None, names], [*((f".{name}", item) for name, item in own), *children]

    def extra(self, value: Any) -> Any:
        """What belongs to it beside its items."""
        if self.name == "deque":
            return value.maxlen
        return set_order.places(value) if self.name in ("set", "frozenset") else None

    def make(self, cls: Any, head: Any) -> Any:
        if self.name == "deque":
            made = cls.__new__(cls)
            begin: Any = self.base.__init__  # type: ignore[misc]
            begin(made, (), head[0])
            return made
        return super().make(cls, head)

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        extra, items, names = head
        wanted = children[len(names) :] if items is None else items
        if self.name == "set":
            set_order.fill(value, list(wanted), extra)
        else:
            self.base.clear(value)  # type: ignore[attr-defined]
            self.base.extend(value, wanted)  # type: ignore[attr-defined]
        if type(value) is not self.base:
            set_attributes(value, names, children[: len(names)])

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        extra, items, names = head
        wanted = children[len(names) :] if items is None else items
        made = (
            set_order.frozen(cls, list(wanted), extra) if self.name == "frozenset" else self.base.__new__(cls, wanted)
        )
        if names:
            set_attributes(made, names, children[: len(names)])
        return made


class Dict(Kind):
    """A dict or one of its subclasses; of a defaultdict with its factory."""

    name = "dict"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = [] if type(value) is dict else visible(value)
        factory = getattr(value, "default_factory", None)
        base = OrderedDict if isinstance(value, OrderedDict) else dict  # it keeps its order beside what a dict holds
        keys, items = list(base.keys(value)), list(base.values(value))
        before = [("<factory>", factory), *((f".{name}", item) for name, item in own)]
        if is_plain(keys) and is_plain(items):
            return [[keys, items], [name for name, _ in own]], before
        pairs = []
        for at, (key, item) in enumerate(zip(keys, items, strict=True)):
            simple = type(key) in SIMPLE
            pairs += [(f"<key {at}>", key), (f"[{key!r}]" if simple and len(repr(key)) < 40 else f"[#{at}]", item)]
        return [None, [name for name, _ in own]], [*before, *pairs]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        plain, names = head
        rest = children[1 + len(names) :]
        pairs = list(zip(*plain, strict=True) if plain else zip(rest[::2], rest[1::2], strict=True))
        base = OrderedDict if isinstance(value, OrderedDict) else dict
        base.clear(value)
        for key, item in pairs:
            base.__setitem__(value, key, item)
        if hasattr(value, "default_factory"):
            value.default_factory = children[0]
        if type(value) is not dict:
            set_attributes(value, names, children[1 : 1 + len(names)])


class _Gone:
    """What a dead reference led to."""


class Weak(Kind):
    """weakref.ref."""

    name = "weakref"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [], [("()", value())]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return weakref.ref(_Gone() if children[0] is None else children[0])


class WeakContainer(Kind):
    """WeakSet, WeakKeyDictionary and WeakValueDictionary."""

    name = "weak container"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        items = list(value.items()) if hasattr(value, "items") else [(item, None) for item in value]
        parts = [part for at, (key, item) in enumerate(items) for part in ((f"<key {at}>", key), (f"[#{at}]", item))]
        return [], parts

    def make(self, cls: Any, head: Any) -> Any:
        return cls()

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value.clear()
        for key, item in zip(children[::2], children[1::2], strict=True):
            if hasattr(value, "items"):
                value[key] = item
            else:
                value.add(key)
