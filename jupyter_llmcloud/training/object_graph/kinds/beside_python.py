"""State that objects of libraries keep where Python does not show it: in shared memory, a bar, a database, hooks."""

from __future__ import annotations

import ctypes
import functools
import types
import weakref
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

from jupyter_llmcloud.training.object_graph.kinds.base import Child, Untouched, visible
from jupyter_llmcloud.training.object_graph.kinds.tensors import is_attached
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.resume.user_code import is_own_module

_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
)  # fmt: skip


class SharedNumbers(Untouched):
    """multiprocessing.Value and Array."""

    name = "shared numbers"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [bytes(memoryview(_raw(value)).cast("B"))], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        ctypes.memmove(ctypes.addressof(_raw(value)), head[0], len(head[0]))


def _raw(value: Any) -> Any:
    return value.get_obj() if hasattr(value, "get_obj") else value


class ThreadEvent(Untouched):
    """threading.Event."""

    name = "event"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.is_set()], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        (value.set if head[0] else value.clear)()


class Labelled(Untouched):
    """What does something, a thread or a logger: the attributes that a cell has given to it."""

    name = "labelled"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = added_to(value)
        return [name for name, _ in own], [(f".{name}", item) for name, item in own]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        vars(value).update(zip(head, children, strict=True))


class ManagedValue(Untouched):
    """What a multiprocessing.Manager keeps in its process: a dict, a list or a value."""

    name = "managed value"
    kept = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [], [("<value>", value.get() if hasattr(value, "get") and hasattr(value, "set") else value._getvalue())]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        if hasattr(value, "set"):
            value.set(children[0])
        elif hasattr(value, "update"):
            value.clear()
            value.update(children[0])
        else:
            value[:] = children[0]


def is_managed(value: Any) -> bool:
    """Whether a manager keeps it; imports nothing."""
    cls = type(value)
    return cls.__module__ == "multiprocessing.managers" and cls.__name__ in ("DictProxy", "ListProxy", "ValueProxy")


class MovedBar(Untouched):
    """A bar of tqdm that the cell moves itself; one that iterates is led with its loop."""

    name = "bar"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        is_moved = getattr(value, "iterable", None) is None and type(getattr(value, "n", None)) in (int, float)
        return [value.n if is_moved else None], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        if head[0] is not None and value.n != head[0]:
            value.n = value.last_print_n = head[0]


class Database(Untouched):
    """A connection of sqlite3: what is in memory is saved; a file lies outside, as any other."""

    name = "database"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        try:
            places = [row[2] for row in value.execute("pragma database_list")]
        except Exception:  # closed
            return [None], []
        if any(places):
            return [None], []
        return [bytes(value.serialize())], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        if head[0] is not None:
            value.rollback()
            value.deserialize(head[0])


class HookNames:
    """Which hooks of the user's own an object has; made to be looked at."""

    def __init__(self, names: list[str]) -> None:
        self.names = names


class OwnHooks(Untouched):
    """They are left as the cell has made them: where they are others than when the training began, that is refused."""

    name = "hooks"
    made = True

    def make(self, cls: Any, head: Any) -> Any:
        return HookNames(list(head))

    def split(self, value: HookNames) -> tuple[Any, list[Child]]:
        return [*value.names], []

    def refusal(self, head: Any) -> str:
        return "a module or a tensor whose hooks were added or removed while it was trained"


def hooks_of(module: torch.nn.Module) -> list[Child]:
    """As a child of a module: those of its own and of its parameters, where it has or was seen to have any."""
    own = vars(module)
    found = [(kind, hook) for kind in _HOOKS for hook in list((own.get(kind) or {}).values())]
    for name, tensor in (own.get("_parameters") or {}).items():
        found += [(name, hook) for kind in _OF_TENSORS for hook in list((getattr(tensor, kind, None) or {}).values())]
    of_user = [(where, hook) for where, hook in found if is_own_hook(hook)]
    names = [f"{where} {getattr(hook, '__qualname__', type(hook).__name__)}" for where, hook in of_user]
    if names:
        _had[id(module)] = weakref.ref(module)
    elif (known := _had.get(id(module))) is None or known() is not module:
        return []
    # What a hook has counted, or closed over, is often known to nobody else.
    return [("<hooks>", HookNames(names)), *((f"<hook {number}>", hook) for number, (_, hook) in enumerate(of_user))]


class LeftOutOfGradients(Untouched):
    """What PowerSGD has left out of gradients and adds to later ones: by the buckets of a wrapper, which change."""

    name = "compression of gradients"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.iter], []

    def refusal(self, head: Any) -> str:
        return "what a PowerSGD hook has left out of the gradients so far"


def states_of_hooks(wrapper: torch.nn.Module) -> list[Child]:
    """As children of a DistributedDataParallel: the states of the hooks that the cell has registered there."""
    own = list(getattr(wrapper, "_comm_hooks", None) or ())
    if ACTIVE.compression:  # --compress-gradients begins anew, and says so in its help
        own = [(hook, state) for hook, state in own if not isinstance(state, PowerSGDState)]
    return [(f"<hook {number}>", state) for number, (_, state) in enumerate(own)]


def added_to(value: Any) -> list[Child]:
    """The attributes that a cell has given to an object of a library: no method of the library knows of them."""
    cls: Any = type(value)
    known = _mentioned_by(cls)
    return [(n, item) for n, item in visible(value) if not (n in known or n[0] == "_") and is_attached(n, item)]


@functools.cache
def _mentioned_by(cls: type) -> frozenset[str]:
    found: set[str] = set()
    of_library = [base for base in cls.__mro__ if not is_own_module(str(base.__module__))]
    pending = [item for base in of_library for item in vars(base).values()]
    while pending:
        item = pending.pop()
        if isinstance(item, types.CodeType):
            found.update(item.co_names)
            pending += item.co_consts
        elif isinstance(item, property):
            pending += [item.fget, item.fset]
        elif isinstance(item, staticmethod | classmethod):
            pending.append(item.__func__)
        elif isinstance(item, types.FunctionType):
            pending += [item.__code__, vars(item).get("__wrapped__")]
    return frozenset(found)


def is_own_hook(hook: Any) -> bool:
    """Whether a hook is the user's own."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    return is_own_module(str(getattr(function, "__module__", "")))


_had: dict[int, weakref.ref[Any]] = {}


def is_shared_numbers(value: Any) -> bool:
    """Of multiprocessing, with a lock or without."""
    if str(type(value).__module__) == "multiprocessing.sharedctypes" and hasattr(value, "get_obj"):
        value = value.get_obj()
    kind: Any = type(value)
    while issubclass(kind, ctypes.Array):
        kind = kind._type_
    return issubclass(kind, ctypes._SimpleCData) and getattr(kind, "_type_", "P") not in "PzZO"  # which are pointers
