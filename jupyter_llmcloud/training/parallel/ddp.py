"""Data parallel: every rank has the whole model, and gradients are averaged (`DistributedDataParallel`).

A wrapper holds its process group in C++. When the group was broken (a Stop, a failed rank), the variable `model` of the
notebook would be useless, although its weights are fine. So the arguments of every wrapper of this process are
remembered, and it is initialised again on the new group; parameters are then those of rank 0.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.group.random_streams import STREAMS
from jupyter_llmcloud.training.parallel.balance import BALANCE
from jupyter_llmcloud.training.parallel.compression import compress
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.parallel.unwrap import chain, unwrapped
from jupyter_llmcloud.training.parallel.whole import Whole

_initialise = DistributedDataParallel.__init__


class DataParallel(Whole):
    """The plan `ddp`."""

    replicated: ClassVar[bool] = True

    def __init__(self) -> None:
        self._arguments: weakref.WeakKeyDictionary[DistributedDataParallel, dict[str, Any]]
        self._arguments = weakref.WeakKeyDictionary()
        self._compressions: weakref.WeakKeyDictionary[DistributedDataParallel, str] = weakref.WeakKeyDictionary()

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

    def prepare(self, model: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        """Initialise a wrapper; one on a group of its own making cannot be rebuilt, and is not remembered."""
        _initialise(model, *args, **kwargs)
        STREAMS.begin_training(model.parameters())
        BALANCE.add_model(model)
        compress(model, ACTIVE.compression)
        options = {name: value for name, value in kwargs.items() if name != "module"}
        if len(args) <= 1 and options.get("process_group") is None and options.get("device_mesh") is None:
            self._arguments[model] = options
            self._compressions[model] = ACTIVE.compression

    def rebuild(self, group: Any) -> int:
        """Initialise every wrapper again on `group`.

        Does nothing when the ranks do not hold the same number of wrappers: which belongs to which could not be told.
        """
        wrappers = list(self._arguments)
        signatures: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(signatures, [_signature(wrapper) for wrapper in wrappers], group)
        if any(signature != signatures[0] for signature in signatures):
            return 0
        for wrapper in wrappers:
            module, was_training = wrapper.module, wrapper.training
            _initialise(wrapper, module, **{**self._arguments[wrapper], "process_group": group})
            wrapper.train(was_training)
            compress(wrapper, self._compressions[wrapper])
        return len(wrappers)


def _signature(wrapper: DistributedDataParallel) -> tuple[str, int]:
    return type(wrapper.module).__name__, sum(parameter.numel() for parameter in wrapper.module.parameters())
