"""The plain model inside its wrappers, at its root and in its parts, and the names that its tensors have there."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

_MANAGED = "_is_fsdp_managed_module"
_OF_FULLY_SHARD = ("__composable_api_state_key_", _MANAGED, "_fsdp_use_orig_params")
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
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


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """What `torch.compile` wraps; any other model as it is."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


def inner(value: Any) -> Any:
    """What a wrapper wraps, one layer of it; anything else as it is."""
    attribute = _attribute(value) if isinstance(value, torch.nn.Module) else ""
    return value._modules[attribute] if attribute else value


def plain_forward(state: Any, kind: type) -> Any:
    """The attributes of a module of this class as before Accelerate has put mixed precision round its forward."""
    if not isinstance(state, dict) or "_original_forward" not in state:
        return state
    plain = {name: item for name, item in state.items() if name not in ("forward", "_original_forward")}
    original = state["_original_forward"]
    # One of this module alone, not of its class; a compiled wrapper puts its own aside on what it wraps.
    if "forward" in state and getattr(original, "__func__", None) is not getattr(kind, "forward", None):
        plain["forward"] = original
    return plain


def plain_reduction(module: torch.nn.Module) -> Any:
    """How a module is pickled as the plain one that it was; None when it is that already. Raises TypeError."""
    if isinstance(module, FullyShardedDataParallel):
        raise TypeError(
            "it is spread over the ranks (FullyShardedDataParallel), and this one has a part of it. It is gathered by "
            "--save"
        )
    if (wrapped := inner(module)) is not module:
        return operator.itemgetter(0), ((wrapped,),)
    if _MANAGED in vars(module):  # by fully_shard, with the module itself or with one that holds it
        kind = plain_class(module)
        return object.__new__, (kind,), plain_forward(_without_shards(vars(module)), kind)
    if "_original_forward" not in vars(module):
        return None
    make, arguments, state, *rest = module.__reduce_ex__(4)
    return make, arguments, plain_forward(state, type(module)), *rest


def plain_class(model: torch.nn.Module) -> type[torch.nn.Module]:
    """The class that a model had before `fully_shard` has put one of its own between."""
    kinds = type(model).__mro__
    return kinds[kinds.index(FSDPModule) + 1] if FSDPModule in kinds else type(model)


def _without_shards(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module without what `fully_shard` has added: its state, and the hooks that belong to it."""
    plain = {name: value for name, value in attributes.items() if not name.startswith(_OF_FULLY_SHARD)}
    for name in _HOOKS:
        own = {key: hook for key, hook in plain[name].items() if not _is_of_fsdp(hook)}
        plain[name] = type(plain[name])(own)
        if (flags := f"{name}_with_kwargs") in plain:
            plain[flags] = type(plain[flags])((key, flag) for key, flag in plain[flags].items() if key in own)
    return plain


def _is_of_fsdp(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # torch wraps those that get the module
    owner = type(hook.__self__) if hasattr(hook, "__self__") else hook
    return str(getattr(owner, "__module__", "")).startswith("torch.distributed.fsdp.")


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
    # Accelerate knows others: DeepSpeed's engine, a model whose parts it has compiled. It looks for packages each time.
    if "deepspeed" not in sys.modules and "_orig_mod" not in vars(model):
        return model
    inside: torch.nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inside


def _attribute(model: torch.nn.Module) -> str:
    """Where a wrapper keeps what it wraps; "" when it is no wrapper."""
    if is_fabric(model):
        return "_forward_module"
    if type(model).__name__ == "PipelinedModel" and type(model).__module__.startswith("jupyter_llmcloud."):
        return "module"
    return next((name for kind, name in _WRAPPERS.items() if isinstance(model, kind)), "")


def is_fabric(value: Any) -> bool:
    """Whether it is what `fabric.setup()` returns, round a wrapper; its state has the names of the plain model."""
    kind = type(value)
    return kind.__name__ == "_FabricModule" and kind.__module__.startswith(("lightning.", "lightning_fabric."))
