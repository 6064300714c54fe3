"""Data parallel: every rank has the whole model, and gradients are averaged (`DistributedDataParallel`).

A wrapper holds its process group in C++. When the group was broken (a Stop, a failed rank), the variable `model` of the
notebook would be useless, although its weights are fine. So the arguments of every wrapper of this process are
remembered, and it is initialised again on the new group; parameters are then those of rank 0.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.group.random_streams import STREAMS
from jupyter_llmcloud.training.parallel.balance import BALANCE
from jupyter_llmcloud.training.parallel.compression import begun_anew, compress
from jupyter_llmcloud.training.parallel.mesh import has_groups
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.parallel.unwrap import chain, unwrapped
from jupyter_llmcloud.training.parallel.whole import Whole

CHECK_EVERY = 16  # steps of optimizers
_THAWED = (
    "{name} was thawed after the model was prepared. DistributedDataParallel averages the gradients of what was "
    "trained then, so that each rank trains {name} by itself now, and the replicas become different models. Thaw it "
    "before accelerator.prepare(), or prepare accelerator.unwrap_model(model) and a new optimizer once more."
)
_initialise = DistributedDataParallel.__init__


class DataParallel(Whole):
    """The plan `ddp`."""

    replicated: ClassVar[bool] = True

    def __init__(self) -> None:
        self._arguments: weakref.WeakKeyDictionary[DistributedDataParallel, dict[str, Any]]
        self._arguments = weakref.WeakKeyDictionary()
        self._averaged: weakref.WeakKeyDictionary[DistributedDataParallel, set[int]] = weakref.WeakKeyDictionary()
        self._num_steps = 0

    def holds(self, model: torch.nn.Module) -> bool:
        """Whether the model is wrapped, be it below or above torch.compile."""
        return any(isinstance(value, DistributedDataParallel) for value in chain(model))

    def wrapper_of(self, model: torch.nn.Module) -> DistributedDataParallel | None:
        """What keeps the model alike on all ranks of the world, if it was handed to that, wrapped or plain."""
        plain = unwrapped(model)  # Accelerate remembers the model as it was before it was wrapped
        return next((wrapper for wrapper in list(self._arguments) if unwrapped(wrapper) is plain), None)

    def install(self) -> None:
        """Stand in for the wrapper's constructor, which Accelerate, a Trainer and the cell itself call."""
        plan = self

        def __init__(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
            plan.prepare(self, *args, **kwargs)

        patches.DDP_WRAPPERS.apply({"torch.nn.parallel:DistributedDataParallel.__init__": lambda _: __init__})
        register_optimizer_step_post_hook(self._after_step)

    def prepare(self, model: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        """Initialise a wrapper, and remember with what: a group in it is replaced when it is renewed."""
        self._initialised(model, *args, **kwargs)
        STREAMS.begin_training(model.parameters())
        BALANCE.add_model(model)
        compress(model, ACTIVE.compression)
        bound = inspect.signature(_initialise).bind(model, *args, **kwargs).arguments
        self._arguments[model] = {name: value for name, value in bound.items() if name not in ("self", "module")}

    def _initialised(self, model: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        _initialise(model, *args, **kwargs)
        self._averaged[model] = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    def _after_step(self, *_: Any) -> None:
        """Say it, once, where ranks train what a cell has thawed after it was wrapped: torch averages none of that."""
        self._num_steps += 1
        if self._num_steps % CHECK_EVERY != 1 or not self._averaged or dist.get_rank() > 0 or dist.get_world_size() < 2:
            return
        for model, averaged in list(self._averaged.items()):
            for name, parameter in model.module.named_parameters():
                if parameter.grad is not None and id(parameter) not in averaged:
                    print(_THAWED.format(name=name), file=sys.stderr)
                    del self._averaged[model]
                    break

    def rebuild(self, group: Any) -> int:
        """Initialise every wrapper again on `group`, or on the group of its own that was made again.

        Does nothing for a group whose ranks do not hold the same wrappers: which belongs to which could not be told.
        """
        own = self._by_group(group)
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, {name: list(map(_signature, found)) for name, found in own.items()}, group)
        rebuilt = 0
        for name in sorted(own):
            members = dist.get_process_group_ranks(c10d._resolve_process_group(name))
            if all(told[rank].get(name) == told[members[0]].get(name) for rank in members):
                rebuilt += sum(self._rebuild(wrapper, group) for wrapper in own[name])
        return rebuilt

    def _by_group(self, world: Any) -> dict[Any, list[DistributedDataParallel]]:
        """The wrappers whose group there is, in the order in which they were made, by the name of the group."""
        found: dict[Any, list[DistributedDataParallel]] = {}
        for wrapper, options in list(self._arguments.items()):
            mesh = options.get("device_mesh")
            if mesh is not None and not has_groups(mesh):
                continue
            own = mesh.get_group(0) if mesh is not None else options.get("process_group") or world
            if own in c10d._world.pg_map:
                found.setdefault(own.group_name, []).append(wrapper)
        return found

    def _rebuild(self, wrapper: DistributedDataParallel, world: Any) -> bool:
        module, was_training, options = wrapper.module, wrapper.training, self._arguments[wrapper]
        hooks = list(wrapper._comm_hooks)
        if not options.get("device_mesh") and not options.get("process_group"):
            options = {**options, "process_group": world}
        self._initialised(wrapper, module, **options)
        wrapper.train(was_training)
        for hook, state in hooks:
            wrapper.register_comm_hook(begun_anew(state, wrapper.process_group), hook)
        return True


def _signature(wrapper: DistributedDataParallel) -> tuple[str, int]:
    return type(wrapper.module).__name__, sum(parameter.numel() for parameter in wrapper.module.parameters())
