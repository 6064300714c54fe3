"""Ranks begin with one model: they check that they have the same one, and take the values of the first rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from jupyter_llmcloud.errors import UsageError

_BUCKET = 64 << 20  # bytes of one broadcast


def begin_alike(model: torch.nn.Module, plan: str) -> None:
    """All ranks call it before the model is spread. Raises the same UsageError on all when they differ."""
    refuse_meta(model, plan)
    _refuse_adaptive_ranks(model, plan)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items() if torch.is_tensor(value)}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, shapes)
    for other, found in enumerate(every):
        if difference := different(every[0], found, "the first rank", f"rank {other}"):
            raise UsageError(f"--plan {plan}: the ranks have made different models: {difference}.")
    with torch.no_grad():
        tensors = [value.detach() for value in (*model.parameters(), *model.buffers())]
        dist._broadcast_coalesced(dist.distributed_c10d._get_default_group(), tensors, _BUCKET, 0)


def refuse_meta(model: torch.nn.Module, plan: str) -> None:
    """Raise UsageError for a model that has no values yet."""
    if name := next((name for name, value in model.named_parameters() if value.is_meta), None):
        raise UsageError(
            f"--plan {plan}: {name} is on the device 'meta' and has no values. Load the model before it is prepared, "
            "without device_map and outside of init_empty_weights()."
        )


def _refuse_adaptive_ranks(model: torch.nn.Module, plan: str) -> None:
    """AdaLoRA drops directions by the gradients that a rank sees: of parts of them, each rank would drop others."""
    configs = getattr(model, "peft_config", None)
    kinds = [str(getattr(config, "peft_type", "")) for config in configs.values()] if isinstance(configs, dict) else []
    if any("ADALORA" in kind for kind in kinds):
        raise UsageError(
            f"--plan {plan}: AdaLoRA chooses which directions stay by whole gradients, which a rank has under "
            "--plan ddp only. Use that, or LoraConfig in place of AdaLoraConfig."
        )


def different(one: dict[str, Any], other: dict[str, Any], holder: str, other_holder: str) -> str:
    """Names the first tensor that only one of two models has, or that has another shape; "" when there is none."""
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in other:
            return f"{holder} has {name}, {other_holder} has not"
        if name not in one:
            return f"{other_holder} has {name}, {holder} has not"
        if one[name] != other[name]:
            return f"{name} is {list(one[name])} for {holder}, {list(other[name])} for {other_holder}"
    return ""
