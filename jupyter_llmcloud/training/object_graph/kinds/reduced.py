"""What tells others how it is made: as pickle is told, or by `state_dict()`."""

from __future__ import annotations

import copyreg
import functools
import types
from typing import Any

import torch

from jupyter_llmcloud.training.object_graph.kinds.base import (
    CannotSave,
    Child,
    Kind,
    Untouched,
    find,
    name_of,
    visible,
)
from jupyter_llmcloud.training.object_graph.kinds.beside_python import added_to, is_own_hook
from jupyter_llmcloud.training.object_graph.kinds.instances import has_plain_layout
from jupyter_llmcloud.training.resume.user_code import is_own_module

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_VALUES = frozenset({"array", "builtins", "collections", "copyreg", "datetime", "decimal", "fractions", "functools",
    "ipaddress", "itertools", "numpy", "operator", "pandas", "pathlib", "re", "scipy", "sklearn", "uuid",
    "zoneinfo", "_operator", "pytz", "PIL"})  # fmt: skip
_BUILTINS = frozenset({"complex", "slice", "range", "iter", "enumerate", "zip", "map", "filter", "reversed", "object"})
_RECONSTRUCTORS = ("_unpickle", "_timedelta_unpickle", "_new_", "__pyx_unpickle", "_reconstruct", "_mareconstruct",
                   "_frombuffer", "scalar", "__newobj__", "__newobj_ex__", "_compile", "_array_reconstructor",
                   "__generator_ctor", "__bit_generator_ctor", "__randomstate_ctor")  # fmt: skip


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
            registered = copyreg.dispatch_table.get(type(value))  # pickle asks there first: a pattern of `re` is there
            reduced = registered(value) if registered is not None else value.__reduce_ex__(4)
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
    """An optimizer, a schedule or a scaler: what it tells and takes as its state, and what that leaves out.

    `state_dict()` of an optimizer knows nothing of the attributes that a class of the user's own has added, and that of
    a schedule nothing of what its functions have closed over.
    """

    name = "stateful"
    made = False
    kept = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        names, own = beside_state(value)
        return names, [("<state>", value.state_dict()), *own]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value.load_state_dict(children[0])
        put_beside_state(value, head, children[1:])


class SavedElsewhere(Untouched):
    """One whose state is saved with what is trained: only what that leaves out is looked at here."""

    name = "stateful followed"
    led = True

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return beside_state(value)

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        put_beside_state(value, head, children)


class Wrapper(Untouched):
    """What Accelerate puts round an optimizer or a schedule: that may hold more than its state."""

    name = "accelerated"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        inner = getattr(value, "optimizer", None) if hasattr(value, "param_groups") else value.scheduler
        own = added_to(value)
        children = [(f".{name}", item) for name, item in own]
        if is_own_module(str(type(inner).__module__)) or beside_state(inner)[1]:
            children.append((".inner", inner))
        return [name for name, _ in own], children

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        vars(value).update(zip(head, children, strict=False))


@functools.cache
def _of_optimizers() -> frozenset[str]:
    """The attributes that every optimizer has, and those that a schedule puts into it."""
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)], 0.1))) | {"step", "_opt_called"}


def beside_state(value: Any) -> tuple[list[str], list[Child]]:
    """Names and values of what the state_dict() of an optimizer or a schedule of the user's leaves out."""
    if isinstance(value, torch.optim.Optimizer):
        is_own = is_own_module(str(type(value).__module__))
        own = [(n, item) for n, item in visible(value) if _is_beside(n)] if is_own else added_to(value)
        hooks = [hook for kind in _HOOKS for hook in list((getattr(value, kind, None) or {}).values())]
        kept = [(f"<hook {number}>", hook) for number, hook in enumerate(filter(is_own_hook, hooks))]
        return [name for name, _ in own], [*((f".{name}", item) for name, item in own), *kept]
    functions = getattr(value, "lr_lambdas", None)
    found = [item for item in functions if _keeps_something(item)] if isinstance(functions, list) else []
    return [], [(f".lr_lambdas[{number}]", item) for number, item in enumerate(found)]


def _is_beside(name: str) -> bool:
    return name not in _of_optimizers() and not name.startswith("_")


def _keeps_something(function: Any) -> bool:
    is_own = isinstance(function, types.FunctionType) and is_own_module(str(function.__module__))
    return is_own and bool(function.__closure__ or function.__defaults__ or vars(function))


def put_beside_state(value: Any, names: list[str], items: list[Any]) -> None:
    """Give it its attributes back; functions, and hooks behind them, are filled by themselves."""
    if names:
        vars(value).update(zip(names, items, strict=False))


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
