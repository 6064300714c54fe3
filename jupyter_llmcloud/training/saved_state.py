"""What a checkpoint holds of a rank: found without help of the cell, taken as values, put back.

Trained objects are those that the cell's Accelerators know, those handed to `run.checkpoint`, and those that belong to
an optimizer that has stepped. Each has an address, which leads to its successor when the cell is executed again: the
order of an Accelerator and its lists, or the depth of a function and the name of a variable.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import itertools
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FrameType, GeneratorType, SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from jupyter_llmcloud.training import artifacts
from jupyter_llmcloud.training.passes import ResumeMissed
from jupyter_llmcloud.training.plain_values import CopyTensor, NotPlain, decode, encode, encode_variable, put_back

_ITERATORS = (enumerate, zip, map, filter, itertools.islice, itertools.chain, itertools.starmap)
SAME_AS = "__llmcloud_same_as__"
_LISTS = ("_models", "_optimizers", "_schedulers", "_custom_objects")


@dataclass(frozen=True)
class Found:
    """An object to save. `shared`: it is the same on every rank, so that the first saves it for all."""

    address: str
    value: Any
    shared: bool

    @property
    def is_module(self) -> bool:
        return isinstance(self.value, torch.nn.Module)


# --- the cell's frames and variables --------------------------------------------------------------------------------


def user_frames(namespace: Mapping[str, Any]) -> list[FrameType]:
    """The frames of the notebook's own code that led here, outermost first."""
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is namespace:
            frames.append(frame)
        frame = frame.f_back
    return frames[::-1] or [_after_the_end(namespace)]


def _after_the_end(namespace: Mapping[str, Any]) -> Any:
    """What stands for the cell's own frame when it has ended."""
    return SimpleNamespace(f_locals=namespace, f_code=SimpleNamespace(co_name="<module>", co_flags=0))


def names_of(frames: Iterable[FrameType]) -> list[str]:
    """Which functions run; comparable between attempts."""
    return [frame.f_code.co_name for frame in frames]


def trainer_runs() -> bool:
    """Whether transformers' Trainer drives the loop, which keeps its own state."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("transformers.trainer"):
            return True
        frame = frame.f_back
    return False


def variables(frames: list[FrameType], given: set[str]) -> dict[str, Any]:
    """The small plain variables by address; `given` are names that a rank's namespace starts with.

    Of several names for one list, only the first holds its items.
    """
    found: dict[str, Any] = {}
    first_names: dict[int, str] = {}
    for depth, frame in enumerate(frames):
        for name, value in list(frame.f_locals.items()):
            if name.startswith("_") or name in given or isinstance(value, type) or callable(value):
                continue
            address = f"{depth} {name}"
            if id(value) in first_names:
                found[address] = {SAME_AS: first_names[id(value)]}
                continue
            try:
                found[address] = encode_variable(value)
            except NotPlain:
                continue
            if isinstance(value, list | dict | set | deque | torch.Tensor):
                first_names[id(value)] = address
    return found


def changed(now: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """Addresses of the variables that are not as they were when the training began."""
    return [address for address, value in now.items() if address not in first or not _equal(value, first[address])]


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):
        return False  # tensors


def set_variables(frames: list[FrameType], saved: dict[str, Any]) -> None:
    """Put variables back into the frames that run now."""
    filled: set[int] = set()
    restored: dict[str, Any] = {}
    for depth, frame in enumerate(frames):
        present = frame.f_locals
        bound = {}
        for address, value in saved.items():
            at, _, name = address.partition(" ")
            if int(at) != depth:
                continue
            if isinstance(value, dict) and SAME_AS in value:
                if value[SAME_AS] in restored:
                    bound[name] = restored[address] = restored[value[SAME_AS]]
                continue
            anew, restored[address] = put_back(value, present.get(name), filled)
            if anew:
                bound[name] = restored[address]
        _bind(frame, bound)


def _bind(frame: FrameType, values: dict[str, Any]) -> None:
    frame.f_locals.update(values)
    # A function keeps its variables elsewhere.
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def used_values(frames: list[FrameType]) -> list[Any]:
    """The values of the variables that the code which runs now mentions; a namespace holds those of other cells too."""
    return [value for frame in frames for name, value in list(frame.f_locals.items()) if name in _mentioned(frame)]


def _mentioned(frame: FrameType) -> set[str]:
    code = frame.f_code
    if not hasattr(code, "co_names"):
        return set()  # the cell has ended
    return {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}


# --- iterators that are not running now ------------------------------------------------------------------------------


def suspended(frames: list[FrameType], given: set[str]) -> dict[str, dict[str, Any]]:
    """The variables of the cell's generators that wait in a variable, by function name."""
    found: dict[str, dict[str, Any]] = {}
    pending = [value for frame in frames for value in list(frame.f_locals.values())]
    while pending:
        value = pending.pop()
        waits = isinstance(value, GeneratorType) and value.gi_frame is not None and not value.gi_running
        if waits and value.gi_frame.f_globals is frames[0].f_globals and value.gi_code.co_name not in found:
            found[value.gi_code.co_name] = variables([value.gi_frame], given)
            pending += [*value.gi_frame.f_locals.values()]
    return found


def resume_suspended(frames: list[FrameType], saved: dict[str, dict[str, Any]]) -> None:
    """A generator runs again and is about to deliver: its variables are those it had; each is taken from `saved`."""
    for frame in frames:
        if frame.f_code.co_flags & inspect.CO_GENERATOR and frame.f_code.co_name in saved:
            set_variables([frame], saved.pop(frame.f_code.co_name))


def keeps_batches(value: Any, depth: int = 0) -> bool:
    """Whether `itertools.cycle` is inside an iterator: it repeats what it has seen, which is not saved."""
    if isinstance(value, itertools.cycle):
        return True
    nests = isinstance(value, _ITERATORS) or (depth > 0 and isinstance(value, tuple))
    return nests and depth < 6 and any(keeps_batches(item, depth + 1) for item in gc.get_referents(value))


# --- trained objects ------------------------------------------------------------------------------------------------


def addresses(frames: list[FrameType], accelerators: dict[str, Any]) -> dict[str, Any]:
    """Everything that could be saved, by address."""
    table: dict[str, Any] = {}
    for at, accelerator in accelerators.items():
        for name in _LISTS:
            for number, value in enumerate(getattr(accelerator, name, ())):
                table[f"accelerator {at} {name} {number}"] = value
        if getattr(accelerator, "scaler", None) is not None:
            table[f"accelerator {at} scaler"] = accelerator.scaler
    for depth, frame in enumerate(frames):
        for name, value in list(frame.f_locals.items()):
            stale = isinstance(value, torch.amp.GradScaler) and name not in _mentioned(frame)
            if not name.startswith("_") and not stale and callable(getattr(type(value), "state_dict", None)):
                table[f"variable {depth} {name}"] = value
    return table


def find(
    table: dict[str, Any], optimizers: Iterable[Any], explicit: Mapping[str, Any], alone: bool = False
) -> list[Found]:
    """What to save of the objects in `table`; `alone`: there is only one rank."""
    chosen = {address: value for address, value in table.items() if address.startswith("accelerator")}
    for name, value in explicit.items():
        _choose(chosen, table, value, name)
    for optimizer in optimizers:
        _choose(chosen, table, optimizer, "optimizer")
    stepped = {id(_inner(value)) for value in chosen.values() if _is_optimizer(value)}
    trained = {id(p) for value in chosen.values() if _is_optimizer(value) for p in parameters_of(value)}
    covered = {id(p) for value in chosen.values() if _is_module(value) for p in value.parameters()}
    modules = {address: value for address, value in table.items() if _is_module(value)}
    for address in sorted(modules, key=lambda a: (-sum(1 for _ in modules[a].modules()), a)):
        own = {id(p) for p in modules[address].parameters()}
        if own & (trained - covered):
            chosen[address] = modules[address]
            covered |= own
    for address, value in table.items():
        follows = isinstance(value, LRScheduler) and id(_inner(value.optimizer)) in stepped
        if (follows or isinstance(value, torch.amp.GradScaler)) and not _is_chosen(chosen, value):
            chosen[address] = value
    return _shared(chosen, alone)


def _choose(chosen: dict[str, Any], table: dict[str, Any], value: Any, name: str) -> None:
    if _is_chosen(chosen, value):
        return
    if not callable(getattr(value, "state_dict", None)):
        raise TypeError(f"{name}={type(value).__name__}: it has no state_dict(), so it cannot be part of a checkpoint.")
    for address, other in table.items():
        if _inner(other) is _inner(value):
            chosen[address] = other
            return
    raise NotPlain(
        f"the {name} ({type(value).__name__}) is no variable of the cell, so it could not be found again: "
        "give it a name, or hand it to accelerator.prepare()"
    )


def _is_chosen(chosen: dict[str, Any], value: Any) -> bool:
    return any(_inner(other) is _inner(value) for other in chosen.values())


def _inner(value: Any) -> Any:
    """Behind the wrappers of Accelerate, DDP and torch.compile."""
    if isinstance(value, torch.nn.Module):
        return artifacts.unwrapped(value)
    if type(value).__module__.startswith("accelerate."):
        name = "optimizer" if hasattr(value, "param_groups") else "scheduler"
        return getattr(value, name, value)
    return value


def _is_optimizer(value: Any) -> bool:
    return isinstance(_inner(value), torch.optim.Optimizer)


def _is_module(value: Any) -> bool:
    return isinstance(value, torch.nn.Module)


def parameters_of(optimizer: Any) -> list[torch.Tensor]:
    """Every parameter of an optimizer, in order."""
    return [p for group in _inner(optimizer).param_groups for p in group["params"]]


def _shared(chosen: dict[str, Any], alone: bool) -> list[Found]:
    wrapped = [value for value in chosen.values() if isinstance(value, DistributedDataParallel) or alone]
    common = {id(p) for value in wrapped if _is_module(value) for p in value.parameters()}
    found = []
    for address, value in chosen.items():
        if _is_module(value):
            shared = alone or isinstance(value, DistributedDataParallel) or _all_in(value.parameters(), common)
        else:
            shared = _is_optimizer(value) and (alone or _all_in(parameters_of(value), common))
        found.append(Found(address, value, shared))
    return found


def _all_in(parameters: Iterable[torch.Tensor], common: set[int]) -> bool:
    ids = {id(p) for p in parameters}
    return bool(ids) and ids <= common


# --- their state ----------------------------------------------------------------------------------------------------


def take(found: list[Found], shared: bool, copy: CopyTensor, copy_later: CopyTensor) -> dict[str, dict[str, Any]]:
    """The states of those objects that are `shared`, or of those that are not, by address; every tensor copied.

    What only an optimizer's step changes may be copied later, as long as it is before the next step.
    """
    covered = {id(p) for item in found if item.is_module for p in item.value.parameters()}
    return {item.address: _state_of(item, covered, copy, copy_later) for item in found if item.shared == shared}


def _state_of(item: Found, covered: set[int], copy: CopyTensor, copy_later: CopyTensor) -> dict[str, Any]:
    value, at = _inner(item.value), item.address
    copy_state = copy_later if _is_optimizer(value) else copy
    state: dict[str, Any] = {"kind": "other", "state": encode(value.state_dict(), copy_state, at)}
    if item.is_module:
        state["kind"] = "module"
        state["trainable"] = [name for name, p in value.named_parameters() if p.requires_grad]
        state["parameters"] = [name for name, _ in value.named_parameters()]
    elif _is_optimizer(value):
        state["kind"] = "optimizer"
        loose = enumerate(p for p in parameters_of(value) if id(p) not in covered)
        state["loose"] = [copy(f"{at} loose {number}", p) for number, p in loose]
    return state


def not_finite(states: dict[str, dict[str, Any]]) -> str:
    """Names the first trained tensor that holds an infinity or no number; "" when all are well."""
    for address, state in states.items():
        if state["kind"] == "module":
            tensors = {name: state["state"].get(name) for name in state["parameters"]}
        elif state["kind"] == "optimizer":
            tensors = dict(_tensors({"state": state["state"]["state"], "loose": state["loose"]}, "optimizer"))
        else:
            continue
        for name, tensor in tensors.items():
            if tensor is not None and not _is_finite(tensor):
                return f"{name} ({address}) holds values that are not finite"
    return ""


def _tensors(value: Any, path: str) -> Iterable[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{path}.{key}")


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def put(states: dict[str, dict[str, Any]], table: dict[str, Any]) -> None:
    """Restore objects; raises ResumeMissed when one is not there any more."""
    for address, state in states.items():
        if address not in table:
            raise ResumeMissed(f"the checkpoint holds a state for {address!r}, but the cell has made no such object.")
        value = _inner(table[address])
        value.load_state_dict(decode(state["state"]))
        if state["kind"] == "module":
            trainable = set(state["trainable"])
            for name, parameter in value.named_parameters():
                parameter.requires_grad_(name in trainable)
    for address, state in states.items():
        if state["kind"] == "optimizer" and state["loose"]:
            _put_loose(_inner(table[address]), state["loose"], table, states)


def _put_loose(optimizer: Any, saved: list[torch.Tensor], table: dict[str, Any], states: dict[str, Any]) -> None:
    modules = [table[address] for address, state in states.items() if state["kind"] == "module"]
    covered = {id(p) for module in modules for p in module.parameters()}
    loose = [p for p in parameters_of(optimizer) if id(p) not in covered]
    with torch.no_grad():
        for parameter, value in zip(loose, saved, strict=True):
            parameter.copy_(value)
