"""The trained objects of a rank: found without help of the cell, their states taken as values and put back.

Trained objects are those that the cell's Accelerators and Trainers know, those handed to `run.checkpoint`, and those
that belong to an optimizer that has stepped. Each has an address, which leads to its successor when the cell is
executed again: the order of an Accelerator and its lists, or the depth of a function and the name of a variable.
"""

from __future__ import annotations

import contextlib
import shutil
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from jupyter_llmcloud.training.checkpoint import sharded_tensors
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.serialization import CopyTensor, NotPlain, decode, encode
from jupyter_llmcloud.training.object_graph import memory
from jupyter_llmcloud.training.parallel.plans import layout_of, replicas_of, trains_apart
from jupyter_llmcloud.training.parallel.unwrap import unwrapped

_LISTS = ("_models", "_optimizers", "_schedulers", "_custom_objects")


@dataclass(frozen=True)
class StatefulObject:
    """An object to save. `shared`: it is the same on every rank, so that the first saves it for all."""

    address: str
    value: Any
    shared: bool

    @property
    def is_module(self) -> bool:
        """Whether it is a torch module."""
        return isinstance(self.value, torch.nn.Module)

    @property
    def is_optimizer(self) -> bool:
        """Whether it is an optimizer, bare or prepared."""
        return _is_optimizer(self.value)


def modules(table: Mapping[str, Any]) -> dict[str, torch.nn.Module]:
    """The modules among objects, by address."""
    return {address: value for address, value in table.items() if isinstance(value, torch.nn.Module)}


def prepared_by(accelerator: Any) -> Iterator[weakref.ref[Any]]:
    """What an Accelerator knows that could be saved."""
    for name in _LISTS:
        for value in getattr(accelerator, name, ()):
            with contextlib.suppress(TypeError):  # an object of the cell without room for that
                yield weakref.ref(value)


def lists_of(accelerator: Any) -> dict[str, list[Callable[[], Any]]]:
    """What an Accelerator has prepared so far, which is kept alive by others only where that can be."""
    names = [*_LISTS, "_dataloaders"]
    return {name: [_leads_to(value) for value in getattr(accelerator, name, ())] for name in names}


def put_lists(accelerator: Any, lists: Mapping[str, list[Callable[[], Any]]]) -> None:
    """Have an Accelerator know no more than what it had prepared then."""
    for name, references in lists.items():
        if isinstance(known := getattr(accelerator, name, None), list):
            known[:] = [value for refer in references if (value := refer()) is not None]


def _leads_to(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def of_accelerators(accelerators: dict[str, Any], without: Collection[int] = ()) -> dict[str, Any]:
    """What Accelerators know that could be saved, by address; `without`: ids of what does not count."""
    table: dict[str, Any] = {}
    for at, accelerator in accelerators.items():
        for name in _LISTS:
            counted = [value for value in getattr(accelerator, name, ()) if id(value) not in without]
            for number, value in enumerate(counted):
                table[f"accelerator {at} {name} {number}"] = value
        if getattr(accelerator, "scaler", None) is not None:
            table[f"accelerator {at} scaler"] = accelerator.scaler
    return table


def find(
    table: dict[str, Any], optimizers: Iterable[Any], explicit: Mapping[str, Any], alone: bool = False
) -> list[StatefulObject]:
    """What to save of the objects in `table`; `alone`: there is only one rank."""
    chosen = {address: value for address, value in table.items() if address.startswith(("accelerator ", "trainer "))}
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


def named(objects: Mapping[str, Any], alone: bool = False) -> list[StatefulObject]:
    """What to save of objects that the cell has handed over by name; `alone`: there is only one rank."""
    return _shared(dict(objects), alone)


def is_in(table: dict[str, Any], value: Any) -> bool:
    """Whether the table leads to an object."""
    return _is_chosen(table, value)


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
    """Behind the wrappers of Accelerate, parallel training and torch.compile."""
    if isinstance(value, torch.nn.Module):
        return unwrapped(value)
    if type(value).__module__.startswith(("accelerate.", "lightning.fabric.", "lightning_fabric.")):
        name = "optimizer" if hasattr(value, "param_groups") else "scheduler"
        return getattr(value, name, value)
    return value


def layers(value: Any) -> list[Any]:
    """An object and what it wraps."""
    inner = _inner(value)
    return [value] if inner is value else [value, inner]


def memory_of(found: list[StatefulObject], is_first: bool = True) -> set[int]:
    """Where the memory begins that these objects' states hold; `is_first`: of the rank that saves what is shared.

    Buffers of replicas are alike only where DistributedDataParallel has just broadcast them: what others have computed
    of their own data since, which an evaluation may read, is theirs.
    """
    tensors: list[torch.Tensor] = []
    for item in found:
        if item.is_module:
            tensors += item.value.parameters()
            if is_first or not item.shared:
                tensors += _kept_buffers(item.value)
        elif item.is_optimizer:
            states = _inner(item.value).state.values()
            tensors += [part for state in states for part in state.values() if isinstance(part, torch.Tensor)]
    return {start for tensor in tensors if (start := memory.start_of(tensor))}


def _kept_buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    """Those of its state_dict()."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def whole_memory_of(found: list[StatefulObject]) -> set[int]:
    """Where memory begins that only a step of an optimizer changes: parameters, and the state of optimizers.

    Raises NotPlain where a rank trains something that is not alike on all: others could not do without that rank.
    """
    alike = {id(p) for item in found if item.is_module and _is_replica(item) for p in item.value.parameters()}
    for item in found:
        if item.is_module or item.is_optimizer:
            tensors = item.value.parameters() if item.is_module else parameters_of(item.value)
            if not (item.shared or _all_in(tensors, alike)):
                raise NotPlain(f"{item.address} is not alike on all ranks")
    modules = [item.value for item in found if item.is_module]
    buffers = {memory.start_of(buffer) for module in modules for buffer in module.buffers()}
    return memory_of(found) - buffers


def _is_replica(item: StatefulObject) -> bool:
    """Whether something keeps a model alike on all ranks, be it known by that or as it was before."""
    return item.shared or (replicas_of(item.value) is not None and not trains_apart(item.value))


def _is_optimizer(value: Any) -> bool:
    return isinstance(_inner(value), torch.optim.Optimizer)


def _is_module(value: Any) -> bool:
    return isinstance(value, torch.nn.Module)


def parameters_of(optimizer: Any) -> list[torch.Tensor]:
    """Every parameter of an optimizer, in order."""
    return [p for group in _inner(optimizer).param_groups for p in group["params"]]


def _shared(chosen: dict[str, Any], alone: bool) -> list[StatefulObject]:
    alike = {address for address, v in chosen.items() if _is_module(v) and (alone or _is_replicated(v))}
    common = {id(p) for address in alike for p in chosen[address].parameters()}
    found = []
    for address, value in chosen.items():
        if is_spread(value):
            shared = False  # each rank has its part
        elif _is_module(value):
            shared = address in alike or _all_in(value.parameters(), common)
        else:
            shared = _is_optimizer(value) and (alone or _all_in(parameters_of(value), common))
        found.append(StatefulObject(address, value, shared))
    return found


def _is_replicated(model: torch.nn.Module) -> bool:
    return layout_of(model).replicated and not trains_apart(model)


def is_spread(value: Any) -> bool:
    """Whether each rank holds only a part of it."""
    tensors = value.parameters() if _is_module(value) else parameters_of(value) if _is_optimizer(value) else ()
    return sharded_tensors.is_sharded(tensors)


def _all_in(parameters: Iterable[torch.Tensor], common: set[int]) -> bool:
    ids = {id(p) for p in parameters}
    return bool(ids) and ids <= common


# --- their state ----------------------------------------------------------------------------------------------------


def take(
    found: list[StatefulObject], shared: bool, copy: CopyTensor, copy_later: CopyTensor
) -> dict[str, dict[str, Any]]:
    """The states of those objects that are `shared`, or of those that are not, by address; every tensor copied.

    What only an optimizer's step changes may be copied later, as long as it is before the next step.
    """
    covered = {id(p) for item in found if item.is_module for p in item.value.parameters()}
    return {item.address: _state_of(item, covered, copy, copy_later) for item in found if item.shared == shared}


def _state_of(item: StatefulObject, covered: set[int], copy: CopyTensor, copy_later: CopyTensor) -> dict[str, Any]:
    value, at = _inner(item.value), item.address
    copy_state = copy_later if _is_optimizer(value) else copy
    if item.is_module:
        values = layout_of(item.value).state(item.value)
    else:
        values = sharded_tensors.localize(value.state_dict()) if is_spread(value) else value.state_dict()
    state: dict[str, Any] = {"kind": "other", "state": encode(values, copy_state, at)}
    if item.is_module:
        state["kind"] = "module"
        state["fixed_size"] = layout_of(item.value).fixed_size
        state["trainable"] = [name for name, p in value.named_parameters() if p.requires_grad]
        state["parameters"] = [name for name, _ in value.named_parameters()]
    elif _is_optimizer(value):
        state["kind"] = "optimizer"
        loose = enumerate(p for p in parameters_of(value) if id(p) not in covered)
        state["loose"] = [copy(f"{at} loose {number}", p) for number, p in loose]
    return state


def gradients(found: list[StatefulObject], copy: CopyTensor) -> dict[str, list[Any]]:
    """The gradients that wait for a step, of these optimizers, by address."""
    taken = {}
    for item in found:
        values = [sharded_tensors.localize(p.grad) for p in parameters_of(item.value)]
        if any(value is not None for value in values):
            taken[item.address] = encode(values, copy, f"gradients {item.address}")
    return taken


def put_gradients(saved: dict[str, list[Any]], table: dict[str, Any]) -> None:
    """Put gradients back. What has none then has none: replay may have left gradients of steps that are taken back."""
    for value in table.values():
        tensors = value.parameters() if _is_module(value) else parameters_of(value) if _is_optimizer(value) else ()
        for parameter in tensors:
            parameter.grad = None
    for address, values in saved.items():
        parameters = parameters_of(table[address])
        for parameter, value in zip(parameters, decode(values), strict=True):
            grad = sharded_tensors.spread_like(value, parameter)
            parameter.grad = grad.to(parameter.device) if grad is not None else None


def inner_optimizer(value: Any) -> Any:
    """The optimizer of torch inside, or None."""
    return _inner(value) if _is_optimizer(value) else None


def not_finite(states: dict[str, dict[str, Any]]) -> str:
    """Names the first trained tensor that holds an infinity or no number; "" when all are well."""
    for address, state in states.items():
        if state["kind"] == "module":
            tensors = {name: state["state"].get(name) for name in state["parameters"]}
        elif state["kind"] == "optimizer":
            tensors = dict(_tensors({"state": state["state"]["state"], "loose": state["loose"]}, "optimizer"))
        else:
            continue
        for name, value in tensors.items():
            tensor = value["local"] if sharded_tensors.is_shard(value) else value
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
        if state["kind"] == "module":
            layout_of(table[address]).put(table[address], decode(state["state"]))
        else:
            value.load_state_dict(sharded_tensors.spread(decode(state["state"]), _reference(value)))
        if state["kind"] == "module":
            trainable = set(state["trainable"])
            for name, parameter in value.named_parameters():
                parameter.requires_grad_(name in trainable)
    for address, state in states.items():
        if state["kind"] == "optimizer" and state["loose"]:
            _put_loose(_inner(table[address]), state["loose"], table, states)


def settings_of(accelerator: Any) -> tuple[Any, ...]:
    """What training changes of an Accelerator itself, or of what stands for one."""
    return (
        accelerator.step,
        accelerator.gradient_state.sync_gradients,
        accelerator.project_configuration.iteration,
        accelerator.gradient_accumulation_steps,  # by a schedule of the cell
    )


def put_settings(accelerator: Any, saved: Sequence[Any], is_restart: bool) -> None:
    """The inverse; of another run of the cell (`--resume`) only what the cell does not set itself."""
    accelerator.step, sync_gradients, *settings = saved
    accelerator.gradient_state._set_sync_gradients(sync_gradients)
    if settings and is_restart:
        accelerator.project_configuration.iteration, accelerator.gradient_accumulation_steps = settings
        set_own_folders_aside(accelerator)


def set_own_folders_aside(accelerator: Any) -> None:
    """Move away what `save_state()` with automatic names wrote after the place where the cell goes on.

    The cell comes there again, and Accelerate refuses to write into a folder that there is.
    """
    settings = accelerator.project_configuration
    if not (settings.automatic_checkpoint_naming and settings.project_dir and accelerator.is_main_process):
        return
    project = Path(settings.project_dir)
    for folder in (project / "checkpoints").glob("checkpoint_*"):
        number = folder.name.removeprefix("checkpoint_")
        if number.isdigit() and int(number) >= settings.iteration:
            aside = project / "checkpoints-of-lost-attempts"
            aside.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(aside / folder.name)
            folder.rename(aside / folder.name)


def _reference(value: Any) -> sharded_tensors.Reference:
    """Which tensor of an object is spread like the one at this place in its state."""
    if _is_optimizer(value):
        parameters = parameters_of(value)
        return lambda path: parameters[path[1]] if path[0] == "state" else None
    return lambda path: None


def _put_loose(optimizer: Any, saved: list[torch.Tensor], table: dict[str, Any], states: dict[str, Any]) -> None:
    modules = [table[address] for address, state in states.items() if state["kind"] == "module"]
    covered = {id(p) for module in modules for p in module.parameters()}
    loose = [p for p in parameters_of(optimizer) if id(p) not in covered]
    with torch.no_grad():
        for parameter, value in zip(loose, saved, strict=True):
            parameter.copy_(value)
