"""How objects are taken apart and put together again: one `Kind` for everything that is stored alike.

A kind splits an object into a head (plain data) and named children (other objects); it makes an empty object, or builds
a whole one from its children, and fills an object that is there with other contents. Nothing here runs code of a file:
classes must be loaded already, objects are made without their constructors, and what pickle would call is called only
when it is known to construct and do nothing else.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.training.resume.user_code import is_own_module

SIMPLE = frozenset({int, float, str, bytes, bool, type(None)})
Child = tuple[str, Any]  # what leads to it, for people to read; itself


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

    def make(self, cls: Any, head: Any) -> Any:
        """An empty one."""
        return cls.__new__(cls)

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        """Give it these contents."""
        raise NotImplementedError

    def refusal(self, head: Any) -> str:
        """Why one that has changed to this cannot be saved; "" when it can."""
        return ""

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        """A whole one, of a kind that is not filled."""
        raise CannotSave(f"a {cls.__name__} cannot be made from a file")


# --- classes by name -------------------------------------------------------------------------------------------------


def name_of(cls: Any) -> str:
    """The name under which a class or a function is found again."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find(name: str) -> Any:
    """The class or function of this name; only of modules that are loaded."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


# --- containers ------------------------------------------------------------------------------------------------------


def _plain(items: Iterable[Any]) -> bool:
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
    for name in [name for name in mine if isinstance(name, str) and name not in names and not _is_hidden(value, name)]:
        del mine[name]
    for name, slot in known.items():
        if name not in names and hasattr(value, name):
            slot.__delete__(value)
    for name, item in zip(names, items, strict=True):
        if name in known:
            known[name].__set__(value, item)
        else:
            mine[name] = item


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
        if _plain(items):
            return [self.extra(value), items, names], [(f".{name}", item) for name, item in own]
        left, right = self._brackets
        children = [(f"{left}{at}{right}", item) for at, item in enumerate(items)]
        return [self.extra(value), None, names], [*((f".{name}", item) for name, item in own), *children]

    def extra(self, value: Any) -> Any:
        """What belongs to it beside its items."""
        return getattr(value, "maxlen", None) if self.name == "deque" else None

    def make(self, cls: Any, head: Any) -> Any:
        if self.name == "deque":
            made = cls.__new__(cls)
            begin: Any = self.base.__init__  # type: ignore[misc]
            begin(made, (), head[0])
            return made
        return super().make(cls, head)

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        _, items, names = head
        self.base.clear(value)  # type: ignore[attr-defined]
        add = self.base.update if self.name == "set" else self.base.extend  # type: ignore[attr-defined]
        add(value, children[len(names) :] if items is None else items)
        if type(value) is not self.base:
            set_attributes(value, names, children[: len(names)])

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        _, items, names = head
        made = self.base.__new__(cls, children[len(names) :] if items is None else items)
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
        if _plain(keys) and _plain(items):
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


# --- objects ---------------------------------------------------------------------------------------------------------

OF_MEMBERS = frozenset({"_value_", "_name_", "__objclass__", "_sort_order_"})


def _is_hidden(value: Any, name: str) -> bool:
    """An attribute that belongs to our own machinery."""
    return name.startswith("__llmcloud") or name == "_llmcloud_number"


def visible(value: Any) -> list[Child]:
    """The attributes that are looked at."""
    return [(name, item) for name, item in attributes(value) if not _is_hidden(value, name)]


class Object(Kind):
    """An instance of a class written in Python."""

    name = "object"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = visible(value)
        return [name for name, _ in own], [(f".{name}", item) for name, item in own]

    def make(self, cls: Any, head: Any) -> Any:
        return object.__new__(cls)

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        set_attributes(value, head, children)


class Module(Kind):
    """A module of torch: its tensors and modules, and the attributes that its class has added.

    Hooks are left as the cell has made them, and so is what belongs to a wrapper such as DistributedDataParallel.
    """

    name = "module"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = vars(value)
        wraps = type(value).__module__.startswith(_WRAPPERS)
        plain = [] if wraps else [(name, item) for name, item in own.items() if not _is_of_module(name)]
        parts = [list((own.get(part) or {}).items()) for part in _PARTS]
        children = [(f".{name}", item) for part in (plain, *parts) for name, item in part]
        return [value.training, [name for name, _ in plain], *([name for name, _ in part] for part in parts)], children

    def make(self, cls: Any, head: Any) -> Any:
        made = object.__new__(cls)
        torch.nn.Module.__init__(made)
        return made

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        training, names, *parts = head
        own, at = vars(value), len(names)
        if not type(value).__module__.startswith(_WRAPPERS):
            for name in [name for name in own if not _is_of_module(name) and name not in names]:
                del own[name]
        own.update(zip(names, children, strict=False))
        own["training"] = training
        for part, inner in zip(_PARTS, parts, strict=True):
            wanted = dict(zip(inner, children[at : at + len(inner)], strict=True))
            at += len(inner)
            present = own[part]
            for name in [name for name in present if name not in wanted]:
                del present[name]
            present.update(wanted)


_PARTS = ("_parameters", "_buffers", "_modules")
_WRAPPERS = ("torch.nn.parallel", "torch.distributed", "torch._dynamo")
_OF_MODULES = frozenset(vars(torch.nn.Module())) | {"_hf_hook", "_old_forward", "_original_forward", "forward"}


def _is_of_module(name: str) -> bool:
    return name in _OF_MODULES or name.startswith("__llmcloud")


def has_plain_layout(cls: type) -> bool:
    """Whether its instances hold nothing but attributes: no part of it is written in C."""
    if any(base is not object and not base.__flags__ & (1 << 9) for base in cls.__mro__):
        return cls.__module__ == "types" and cls.__name__ == "SimpleNamespace"
    weak, own_dict = cls.__weakrefoffset__ > 0, cls.__dictoffset__ > 0
    return cls.__basicsize__ <= object.__basicsize__ + 8 * (len(slots(cls)) + weak + own_dict)


class Local(Object):
    """threading.local, as the main thread sees it."""

    name = "threading.local"

    def make(self, cls: Any, head: Any) -> Any:
        return cls.__new__(cls)


class Raised(Kind):
    """An exception that was kept, without its traceback."""

    name = "exception"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = visible(value)
        return [name for name, _ in own], [("<arguments>", value.args), *((f".{name}", item) for name, item in own)]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value.args = children[0]
        set_attributes(value, head, children[1:])


class Buffer(Kind):
    """io.StringIO and io.BytesIO."""

    name = "io buffer"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.getvalue(), value.tell()], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value.seek(0)
        value.truncate()
        value.write(head[0])
        value.seek(head[1])


class Scalar(Kind):
    """One number of numpy."""

    name = "numpy scalar"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.dtype.str, value.tobytes()], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return np.frombuffer(head[1], np.dtype(head[0]))[0]


class Loader(Kind):
    """A DataLoader: which batch is next is known elsewhere, what it draws from may change."""

    name = "loader"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        parts = ("dataset", "sampler", "batch_sampler", "collate_fn")
        found = [(f".{name}", getattr(value, name, None)) for name in parts]
        own = [(name, part) for name, part in found if name == ".dataset" or is_own_module(type(part).__module__)]
        return [name for name, _ in own], own

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        """Its parts are filled by themselves."""


class Member(Kind):
    """A member of an enumeration, with attributes of its own."""

    name = "enum"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = [(name, item) for name, item in visible(value) if name not in OF_MEMBERS]
        plain = value.value if type(value.value) in SIMPLE else None
        return [value.name, plain, [name for name, _ in own]], [(f".{name}", item) for name, item in own]

    def make(self, cls: Any, head: Any) -> Any:
        return cls[head[0]] if head[0] in cls.__members__ else cls(head[1])

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        vars(value).update(zip(head[2], children, strict=True))


class Numbers(Kind):
    """A generator of random numbers."""

    name = "random.Random"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        version, numbers, gauss = value.getstate()
        own = [] if not hasattr(value, "__dict__") else visible(value)
        head = [version, list(numbers), gauss, [name for name, _ in own]]
        return head, [(f".{name}", item) for name, item in own]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value.setstate((head[0], tuple(head[1]), head[2]))
        if head[3]:
            set_attributes(value, head[3], children)


class TorchNumbers(Kind):
    """torch.Generator."""

    name = "torch.Generator"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [str(value.device), value.get_state().numpy().tobytes()], []

    def make(self, cls: Any, head: Any) -> Any:
        return torch.Generator(head[0])

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value.set_state(torch.frombuffer(bytearray(head[1]), dtype=torch.uint8))


class NumpyNumbers(Kind):
    """numpy's bit generators, whose state two generators may share, and RandomState."""

    name = "numpy numbers"
    kept = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [], [("<state>", value.get_state(legacy=False) if hasattr(value, "get_state") else value.state)]

    def make(self, cls: Any, head: Any) -> Any:
        return cls(0)

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        if hasattr(value, "set_state"):
            value.set_state(children[0])
        else:
            value.state = children[0]


class OverBits(Kind):
    """np.random.Generator, over its bit generator."""

    name = "numpy generator"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [], [("<bits>", value.bit_generator)]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return cls(children[0])


class Bytes(Kind):
    """bytearray."""

    name = "bytearray"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [bytes(value)], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value[:] = head[0]


class View(Kind):
    """memoryview of a whole object."""

    name = "memoryview"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        if value.obj is None or value.nbytes != memoryview(value.obj).nbytes or not value.contiguous:
            raise CannotSave("a memoryview of a part of something")
        return [value.format], [("<object>", value.obj)]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        found = memoryview(children[0])
        return found if found.format == head[0] else found.cast(head[0])


class Numbered(Kind):
    """array.array."""

    name = "array.array"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.typecode, value.tobytes()], []

    def make(self, cls: Any, head: Any) -> Any:
        return cls(head[0])

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        del value[:]
        value.frombytes(head[1])


# --- code that keeps something ---------------------------------------------------------------------------------------

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
    is_slot = type(item).__name__ in ("member_descriptor", "getset_descriptor", "_abc_data")
    of_enum = name.startswith("_member") or name in ("_value2member_map_", "_unhashable_values_", "_hashable_values_")
    return not (name.startswith("__") and name.endswith("__")) and not is_slot and not of_enum


class Function(Kind):
    """A function of the user's own: its attributes, what it has closed over, and its defaults."""

    name = "function"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = [(f".{name}", item) for name, item in vars(value).items() if isinstance(name, str)]
        cells = [
            (f"<closure {n}>", c) for n, c in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        ]
        defaults = [("<defaults>", value.__defaults__), ("<keyword defaults>", value.__kwdefaults__)]
        return [value.__qualname__, [n[1:] for n, _ in own], len(cells)], [*own, *cells, *defaults]

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


class Cell(Kind):
    """What two functions share of a variable of the function round them."""

    name = "cell"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        try:
            return [True], [("", value.cell_contents)]
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


class Method(Kind):
    """A bound method, also of a built-in object."""

    name = "method"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.__name__], [("<self>", value.__self__)]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return getattr(children[0], head[0])


class OpenFile(Kind):
    """An open file: where it is read; one that is written to must not have been, unless it is appended to."""

    name = "file"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        if value.closed:
            return ["closed", 0], []
        mode = str(getattr(value, "mode", ""))
        if not value.seekable() or mode.startswith("a") or "a" in mode:
            return ["stream", 0], []
        if value.writable():
            return ["written", value.tell()], []
        return ["read", _position(value)], []

    def refusal(self, head: Any) -> str:
        return "a file that was written to (one that is opened to append is no trouble)" if head[0] == "written" else ""

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        if head[0] == "read":
            value.seek(head[1])
        elif head[0] == "closed":
            value.close()


def _position(value: Any) -> int:
    try:
        return int(value.tell())
    except OSError:  # lines of it are being read
        raise CannotSave("a file that is being read line by line, which does not tell how far it is") from None


# --- as pickle would -------------------------------------------------------------------------------------------------

_VALUES = frozenset({"array", "builtins", "collections", "copyreg", "datetime", "decimal", "fractions", "functools",
    "ipaddress", "itertools", "numpy", "operator", "pandas", "pathlib", "re", "scipy", "sklearn", "uuid",
    "zoneinfo", "_operator", "pytz", "PIL"})  # fmt: skip
_BUILTINS = frozenset({"complex", "slice", "range", "iter", "enumerate", "zip", "map", "filter", "reversed", "object"})
_RECONSTRUCTORS = ("_unpickle", "_new_", "__pyx_unpickle", "_reconstruct", "_mareconstruct", "_frombuffer", "scalar",
                   "__newobj__", "__newobj_ex__", "_compile", "_array_reconstructor", "__generator_ctor",
                   "__bit_generator_ctor", "__randomstate_ctor")  # fmt: skip


def may_construct(function: Any) -> bool:
    """Whether a function or class is known to construct a value and to do nothing else."""
    module, name = str(getattr(function, "__module__", "")), str(getattr(function, "__name__", ""))
    package = module.partition(".")[0]
    if package == "builtins":
        return name in _BUILTINS
    if package not in _VALUES:
        return False
    if isinstance(function, type):
        return package != "functools" or name == "partial"
    return name.startswith(_RECONSTRUCTORS)


class Reduced(Kind):
    """What tells pickle how it is made: a function, its arguments, a state, items."""

    name = "reduced"
    filled = False
    kept = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:
            raise CannotSave(f"a {type(value).__module__}.{type(value).__name__} ({error})") from None
        if isinstance(reduced, str) or not may_construct(reduced[0]):
            raise CannotSave(f"a {type(value).__module__}.{type(value).__name__}")
        function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        if function.__name__ in ("__newobj__", "__newobj_ex__") and not _may_be_new(arguments[0]):
            raise CannotSave(f"a {type(value).__module__}.{type(value).__name__}")
        children = [("<arguments>", tuple(arguments)), ("<state>", state)]
        children += [("<items>", list(items) if items is not None else None)]
        children += [("<pairs>", list(pairs) if pairs is not None else None)]
        return [name_of(function)], children

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        function = find(head[0])
        arguments, state, items, pairs = children
        if function is None or not may_construct(function):
            raise CannotSave(f"{head[0]} is not called for a file")
        if function.__name__ in ("__newobj__", "__newobj_ex__") and not _may_be_new(arguments[0]):
            raise CannotSave(f"a {arguments[0]} is not made for a file")
        made = function(*arguments)
        if state is not None:
            set_state(made, state)
        if items is not None:
            made.extend(items)
        for key, item in pairs or ():
            made[key] = item
        return made


class Restated(Kind):
    """What is made empty and then told its state, as pickle does it: a DataFrame."""

    name = "restated"
    kept = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        _, _, state, *_ = value.__reduce_ex__(4)
        return [], [("<state>", state)]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        set_state(value, children[0])


class Stateful(Kind):
    """An optimizer, a schedule or a scaler: what it tells and takes as its state."""

    name = "stateful"
    made = False
    kept = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [], [("<state>", value.state_dict())]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value.load_state_dict(children[0])


def _may_be_new(cls: Any) -> bool:
    return isinstance(cls, type) and (may_construct(cls) or has_plain_layout(cls) or is_own_module(str(cls.__module__)))


def set_state(value: Any, state: Any) -> None:
    """As pickle does it."""
    if hasattr(value, "__setstate__"):
        value.__setstate__(state)
        return
    own, in_slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if own:
        vars(value).update(own)
    for name, item in (in_slots or {}).items():
        object.__setattr__(value, name, item)


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


class Torch(Kind):
    """dtype, device, Size and their like, which are equal when they read alike."""

    name = "torch value"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        if isinstance(value, torch.Size):
            return ["Size", list(value)], []
        return [type(value).__name__, str(value)], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        kind, text = head
        if kind == "Size":
            return torch.Size(text)
        return torch.device(text) if kind == "device" else getattr(torch, text.removeprefix("torch."))


class Fixed(Kind):
    """What is no state of a training: a connection, a lock, a tokenizer. The cell makes it again."""

    name = "fixed"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        """It stays as it is."""


class Unsaved(Kind):
    """What cannot be saved, and not even compared."""

    name = "unsaved"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        raise CannotSave(f"a {type(value).__module__}.{type(value).__name__}")
