"""DDP wrappers outlive the group they were made on: after a renewed group each is made again, in place.

A `DistributedDataParallel` holds its process group in C++. When the group was broken (a Stop, a failed rank), the
variable `model` of the notebook would be useless, although its weights are fine. So every wrapper of this process is
remembered with its arguments, and initialised again on the new group; parameters are then those of rank 0.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

_arguments: weakref.WeakKeyDictionary[DistributedDataParallel, dict[str, Any]] = weakref.WeakKeyDictionary()
_original_init = DistributedDataParallel.__init__


def remember_wrappers() -> None:
    """From now on remember how each DDP wrapper was made. Called once, in a rank."""

    @functools.wraps(_original_init)
    def __init__(self: DistributedDataParallel, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        _original_init(self, module, *args, **kwargs)
        if not args and kwargs.get("process_group") is None and kwargs.get("device_mesh") is None:
            _arguments[self] = kwargs

    DistributedDataParallel.__init__ = __init__  # type: ignore[method-assign]


def wrap_again() -> int:
    """Initialise every wrapper on the present default group; all ranks must call it. Returns how many.

    Does nothing when the ranks do not hold the same number of wrappers: which belongs to which could not be told.
    """
    wrappers = sorted(_arguments, key=lambda wrapper: list(_arguments).index(wrapper))
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, [_signature(wrapper) for wrapper in wrappers])
    if any(count != counts[0] for count in counts):
        return 0
    for wrapper in wrappers:
        module, was_training = wrapper.module, wrapper.training
        _original_init(wrapper, module, **_arguments[wrapper])
        wrapper.train(was_training)
    return len(wrappers)


def _signature(wrapper: DistributedDataParallel) -> tuple[str, int]:
    return type(wrapper.module).__name__, sum(parameter.numel() for parameter in wrapper.module.parameters())
