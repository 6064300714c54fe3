"""Objects: instances of classes written in Python, modules of torch, exceptions, members of an enumeration."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.data import BatchSampler, SubsetRandomSampler, WeightedRandomSampler

from jupyter_llmcloud.training.checkpoint.rng import parts_of
from jupyter_llmcloud.training.object_graph.kinds.base import (
    SIMPLE,
    Child,
    Kind,
    Untouched,
    name_of,
    set_attributes,
    slots,
    visible,
)
from jupyter_llmcloud.training.object_graph.kinds.beside_python import added_to, hooks_of, states_of_hooks
from jupyter_llmcloud.training.resume.user_code import is_own_module

OF_MEMBERS = frozenset({"_value_", "_name_", "__objclass__", "_sort_order_"})


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


class Counting(Untouched):
    """An object of a library that counts what it is told, and comes back with the cell: its plain attributes."""

    name = "counting"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        found = [(name, item) for name, item in visible(value) if type(item) in SIMPLE]
        return [name for name, _ in found], [(f".{name}", item) for name, item in found]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        for name, item in zip(head, children, strict=True):
            setattr(value, name, item)


class Module(Kind):
    """A module of torch: its tensors and modules, and the attributes that its class has added.

    Hooks are left as the cell has made them, and so is what belongs to a wrapper such as DistributedDataParallel.
    """

    name = "module"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = vars(value)
        wraps = name_of(type(value)).startswith(_WRAPPERS)
        if wraps:
            plain = [*((name, own[name]) for name in _OF_WRAPPERS if name in own), *added_to(value)]
        else:
            out = _left_out(value)
            plain = [
                (n, item) for n, item in own.items() if not (n in out or _is_of_module(n) or _is_outdated_view(item))
            ]
            plain += [(n, item) for n, item in own.items() if _is_bound_by_cell(n, item)]
        parts = [list((own.get(part) or {}).items()) for part in _PARTS]
        children = [(f".{name}", item) for part in (plain, *parts) for name, item in part]
        children += states_of_hooks(value) if wraps else hooks_of(value)
        return [value.training, [name for name, _ in plain], *([name for name, _ in part] for part in parts)], children

    def make(self, cls: Any, head: Any) -> Any:
        made = object.__new__(cls)
        torch.nn.Module.__init__(made)
        made.__dict__[_IS_NEW] = True
        return made

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        training, names, *parts = head
        own, at = vars(value), len(names)
        if not name_of(type(value)).startswith(_WRAPPERS):
            out = _left_out(value)
            for name in [name for name in own if not (name in out or _is_of_module(name) or name in names)]:
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
        if own.pop(_IS_NEW, False) and _has_own(type(value), "__setstate__"):
            value.__setstate__(dict(own))  # makes what its class has left out


def _left_out(module: torch.nn.Module) -> frozenset[str]:
    """What its class leaves out of its state and makes again, as metrics do with what wraps their methods."""
    if not _has_own(type(module), "__getstate__") or not _has_own(type(module), "__setstate__"):
        return frozenset()
    try:
        state = module.__getstate__()
    except Exception:  # of a class that cannot be pickled after all
        return frozenset()
    return frozenset(vars(module).keys() - state.keys()) if isinstance(state, dict) else frozenset()


def _has_own(cls: type, name: str) -> bool:
    """Whether a class has a method of its own in the place of what every module has."""
    return getattr(cls, name, None) not in (getattr(torch.nn.Module, name, None), getattr(object, name, None))


_IS_NEW = "__llmcloud_is_new"
_PARTS = ("_parameters", "_buffers", "_modules")
_WRAPPERS = ("torch.nn.parallel", "torch.distributed", "torch._dynamo")
# Whether ranks have the buffers of the first one at the next forward, which depends on how the last one was made.
_OF_WRAPPERS = ("require_forward_param_sync",)
_OF_MODULES = frozenset(vars(torch.nn.Module())) | {"_hf_hook", "_old_forward", "_original_forward", "forward"}
_OF_MODULES |= {"_metric_attributes"}  # of Lightning, by id(): another one in another process


def _is_bound_by_cell(name: str, item: Any) -> bool:
    """Whether a module was given another `forward` by a cell, not by a library."""
    function = item.func if isinstance(item, functools.partial) else getattr(item, "__func__", item)
    names = getattr(function, "__globals__", {})
    return name == "forward" and is_own_module(str(names.get("__name__")))


def _is_of_module(name: str) -> bool:
    return name in _OF_MODULES or name.startswith(("__llmcloud", "__composable_api_"))


def _is_outdated_view(value: Any) -> bool:
    """A view of parameters that were gathered, which FullyShardedDataParallel leaves in the place of a parameter."""
    if not isinstance(value, torch.Tensor):
        return False
    try:
        _ = value.is_leaf
    except RuntimeError:  # its base has changed: it cannot be asked, nor used
        return True
    return False


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


class Loader(Untouched):
    """A DataLoader: which batch is next is known elsewhere; what it draws from may change, and is filled by itself.

    So may the attributes that a cell has given to it.
    """

    name = "loader"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        parts = ("dataset", "sampler", "batch_sampler", "collate_fn")
        found = [(f".{name}", getattr(value, name, None)) for name in parts]
        own = [(name, part) for name, part in found if name == ".dataset" or _may_change(part)]
        # Those that Accelerate has put its own ones round, in the order in which they lie.
        known = {id(part) for _, part in own}
        inner = [part for part in parts_of(value)[1:] if _may_change(part) and id(part) not in known]
        own += [(f"<inner {number}>", part) for number, part in enumerate(inner)]
        added = added_to(value)
        own += [(f".{name}", item) for name, item in added]
        return [[name for name, _ in own], [name for name, _ in added]], own

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        _, added = head
        vars(value).update(zip(added, children[len(children) - len(added) :], strict=True))


_CHANGED_BY_LOOPS = (WeightedRandomSampler, SubsetRandomSampler, BatchSampler)


def _may_change(part: Any) -> bool:
    """Whether a sampler or a collate function is the user's own, or one of torch's whose contents loops change."""
    return is_own_module(type(part).__module__) or type(part) in _CHANGED_BY_LOOPS or bool(added_to(part))


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
