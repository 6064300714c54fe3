"""Code that keeps something: functions and classes of the user's own, closures, caches, bound methods."""

from __future__ import annotations

import functools
import gc
import hashlib
import sys
from types import CodeType, MethodType
from typing import Any

from jupyter_llmcloud.training.object_graph.kinds.base import CannotSave, Child, Kind, Untouched, find, name_of

_SLOT_TYPES = (property, staticmethod, classmethod)


class Class(Kind):
    """A class of the user's own: what it holds beside its methods, and what those hold."""

    name = "class"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        found = []
        for name, attribute in list(vars(value).items()):
            item = attribute.__func__ if isinstance(attribute, staticmethod | classmethod) else attribute
            if isinstance(item, property):
                found += [(f".{name}<{part}>", f) for part in ("fget", "fset", "fdel") if (f := getattr(item, part))]
                continue
            if _is_of_class(name, item):
                found.append((f".{name}", item))
        if hasattr(value, "__members__"):
            found += [(f".{name}", item) for name, item in value.__members__.items()]
        return [name for name, _ in found], found

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        present = vars(value)
        for suffix, item in zip(head, children, strict=True):
            name = suffix[1:]
            was = present.get(name)
            if "<" in name or isinstance(was, _SLOT_TYPES) or was is item or name in getattr(value, "__members__", ()):
                continue
            type.__setattr__(value, name, item)
        known = {suffix[1:] for suffix in head}
        for name in [n for n, item in list(present.items()) if _is_of_class(n, item) and n not in known]:
            if not isinstance(present[name], _SLOT_TYPES):
                type.__delattr__(value, name)


def _is_of_class(name: str, item: Any) -> bool:
    is_slot = type(item).__name__ in ("member_descriptor", "getset_descriptor", "_abc_data", "_tuplegetter")
    of_enum = name.startswith("_member") or name in ("_value2member_map_", "_unhashable_values_", "_hashable_values_")
    return not (name.startswith("__") and name.endswith("__")) and not is_slot and not of_enum


class Code(Untouched):
    """What a function does: a name that is bound to another function may be all that tells of a change."""

    name = "code"

    def split(self, value: CodeType) -> tuple[Any, list[Child]]:
        return [_digest_of(value)], []

    def fits(self, value: CodeType, head: Any) -> bool:
        """Whether it does the same."""
        return [_digest_of(value)] == head


@functools.lru_cache(maxsize=10_000)
def _digest_of(code: CodeType) -> str:
    """Alike in all processes that have it of one source."""
    found = hashlib.blake2b(code.co_code, digest_size=16)
    found.update(repr((code.co_names, code.co_varnames)).encode())
    for item in code.co_consts:
        found.update(_told_of(item).encode())
    return found.hexdigest()


def _told_of(constant: Any) -> str:
    if isinstance(constant, CodeType):
        return _digest_of(constant)
    # The order of a set is another one in each process.
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


class Function(Kind):
    """A function of the user's own: its code, its attributes, what it has closed over, and its defaults."""

    name = "function"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = [(f".{name}", item) for name, item in vars(value).items() if isinstance(name, str)]
        cells = [
            (f"<closure {n}>", c) for n, c in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        ]
        others = [
            ("<code>", value.__code__), ("<defaults>", value.__defaults__), ("<keyword defaults>", value.__kwdefaults__)
        ]  # fmt: skip
        return [value.__qualname__, [n[1:] for n, _ in own], len(cells)], [*own, *cells, *others]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        _, names, _ = head
        own = vars(value)
        for name in [name for name in own if name not in names]:
            del own[name]
        own.update(zip(names, children, strict=False))
        if value.__defaults__ is not children[-2]:
            value.__defaults__ = children[-2]
        if value.__kwdefaults__ is not children[-1]:
            value.__kwdefaults__ = children[-1]


class Compiled(Kind):
    """A function that torch.compile has wrapped: the function. What it was compiled to is made again."""

    name = "compiled"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [], [("<function>", value._torchdynamo_orig_callable)]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        """Its function is filled by itself."""


class ClosureCell(Kind):
    """What two functions share of a variable of the function round them."""

    name = "cell"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        try:
            # A path of its own: what is found again by its path would be taken for the cell.
            return [True], [("<contents>", value.cell_contents)]
        except ValueError:
            return [False], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        if children:
            value.cell_contents = children[0]
        else:
            del value.cell_contents


class Cache(Kind):
    """functools.lru_cache: what a cache of any size holds can be reached, one with a limit keeps it to itself."""

    name = "lru_cache"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        info = value.cache_info()
        if info.maxsize is not None and info.currsize:
            return [info.currsize, info.misses], [("<function>", value.__wrapped__)]
        return [None, None], [("<function>", value.__wrapped__), ("<cache>", self._kept(value))]

    def refusal(self, head: Any) -> str:
        return "" if head[0] is None else "the results in a functools.lru_cache of limited size (maxsize=None is saved)"

    @staticmethod
    def _kept(value: Any) -> Any:
        return next(
            (found for found in gc.get_referents(value) if type(found) is dict and found is not vars(value)), {}
        )

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        """Its dict is filled by itself."""


class Context(Kind):
    """contextvars.ContextVar: its value in the main thread's context."""

    name = "ContextVar"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        missing = object()
        found = value.get(missing)
        return [value.name], [] if found is missing else [("<value>", found)]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        if children:
            value.set(children[0])


class Method(Kind):
    """A bound method, also of a built-in object."""

    name = "method"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        owner, function = value.__self__, getattr(value, "__func__", None)
        of_class = getattr(type(owner), value.__name__, None)
        if function is None or isinstance(owner, type) or getattr(of_class, "__func__", of_class) is function:
            return [value.__name__], [("<self>", owner)]
        return [value.__name__], [("<self>", owner), ("<function>", function)]  # which the cell has bound itself

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return MethodType(children[1], children[0]) if len(children) > 1 else getattr(children[0], head[0])


class Named(Kind):
    """A class, function or module of a library: it is found again by its name."""

    name = "named"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        if isinstance(value, type(sys)):
            return [f"{value.__name__}:"], []
        return [name_of(value) if hasattr(value, "__qualname__") and value.__module__ else repr(type(value))], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        module, _, path = head[0].partition(":")
        found = find(head[0]) if path else sys.modules.get(module)
        if found is None:
            raise CannotSave(f"{head[0]} is not there")
        return found
