"""Layers are shared out as the stages of a pipeline: a rank has some tensors of the model whole, not the others."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from jupyter_llmcloud.training.parallel.whole import Whole

_PIPELINED = "jupyter_llmcloud.training.parallel.strategies.microbatches"


class Stages(Whole):
    """The layout of a model under `pipeline:N`."""

    fixed_size: ClassVar[str] = (
        "a model in stages can be resumed on the same number of ranks only, under the same --plan pipeline:N."
    )

    def holds(self, model: torch.nn.Module) -> bool:
        """Whether it is a stage."""
        module = sys.modules.get(_PIPELINED)
        return module is not None and isinstance(model, module.PipelinedModel)

    def full_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What every stage has, on all ranks."""
        own = {name: value.detach() for name, value in super().full_state(model).items()}
        found: dict[str, torch.Tensor] = {}
        for rank in range(dist.get_world_size()):
            names: list[Any] = [[(name, value.shape, value.dtype) for name, value in own.items()]]
            dist.broadcast_object_list(names, rank)
            for name, shape, dtype in names[0]:
                tensor = own[name].contiguous().clone() if rank == dist.get_rank() else torch.empty(shape, dtype=dtype)
                tensor = tensor.to(next(iter(own.values())).device) if own else tensor
                dist.broadcast(tensor, rank)
                found[name] = tensor
        order: dict[str, Any] = self.shapes(model)
        return {name: found[name] for name in order if name in found}

    def shapes(self, model: torch.nn.Module) -> dict[str, tuple[int, ...] | None]:
        """Those of the whole model."""
        return dict(model.shapes)  # type: ignore[arg-type]
