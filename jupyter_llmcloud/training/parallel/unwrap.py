"""The plain model inside its wrappers, at its root and in its parts, and the names that its tensors have there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

_WRAPPERS: dict[type[torch.nn.Module], str] = {
    DistributedDataParallel: "module",
    torch.nn.DataParallel: "module",
    FullyShardedDataParallel: "_fsdp_wrapped_module",
    OptimizedModule: "_orig_mod",
    ActivationWrapper: "_checkpoint_wrapped_module",
}


def unwrapped(value: Any) -> Any:
    """A model without the parallel and compiled wrappers around it; anything else as it is."""
    return list(chain(value))[-1]


def chain(value: Any) -> Iterator[Any]:
    """A model, what it wraps, and so on to the plain one."""
    while True:
        yield value
        inside = _inside(value) if isinstance(value, torch.nn.Module) else value
        if inside is value:
            return
        value = inside


def plain_name(model: torch.nn.Module, name: str) -> str:
    """The name that a tensor of a model's state has in the plain model."""
    while attribute := _attribute(model):
        name = name.removeprefix(attribute + ".")
        model = model._modules[attribute]  # type: ignore[assignment]
    head, dot, rest = name.partition(".")
    part = model._modules.get(head) if dot else None
    return f"{head}.{plain_name(part, rest)}" if part is not None else name


def _inside(model: torch.nn.Module) -> torch.nn.Module:
    if attribute := _attribute(model):
        return model._modules[attribute]  # type: ignore[return-value]
    # Accelerate knows others: DeepSpeed's engine, a model whose parts it has compiled.
    inside: torch.nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inside


def _attribute(model: torch.nn.Module) -> str:
    """Where a wrapper keeps what it wraps; "" when it is no wrapper."""
    return next((name for kind, name in _WRAPPERS.items() if isinstance(model, kind)), "")
