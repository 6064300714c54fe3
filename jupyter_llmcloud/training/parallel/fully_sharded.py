"""Parameters are cut one by one (`fully_shard`, tensor parallel): each rank holds its shard of every DTensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from jupyter_llmcloud.training.checkpoint import sharded_tensors
from jupyter_llmcloud.training.parallel.unwrap import plain_name, unwrapped
from jupyter_llmcloud.training.parallel.whole import Whole


class FullyShards(Whole):
    """The layout that user code makes by `fully_shard`, or by torch's tensor parallel."""

    def holds(self, model: torch.nn.Module) -> bool:
        """Whether one of its parameters is spread."""
        return sharded_tensors.is_sharded(model.parameters())

    def state(self, model: torch.nn.Module) -> dict[str, Any]:
        """The shards of this rank, with how they are cut."""
        return dict(sharded_tensors.localize(super().state(model)))

    def put(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        """Load shards as the model is cut now."""
        settle(model)
        now = unwrapped(model).state_dict()
        super().put(model, sharded_tensors.spread(state, lambda path: now.get(path[0])))

    def full_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Every tensor put together; tied ones stay one."""
        settle(model)
        gathered: dict[int, torch.Tensor] = {}
        state = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, value in model.state_dict().items():
            key = id(parameters.get(name, value))
            if key not in gathered:
                gathered[key] = _whole(value)
            state[plain_name(model, name)] = gathered[key]
        return state


def settle(value: Any) -> bool:
    """Parameters that were gathered for a forward pass are let go again, so that the module holds its shards.

    Returns whether there are such parameters.
    """
    modules = value.modules() if isinstance(value, torch.nn.Module) else ()
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.reshard()
    return bool(sharded)


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor  # without the padding of the shards
