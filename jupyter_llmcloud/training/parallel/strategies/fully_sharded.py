"""The plans `fsdp` and `hsdp`: every parameter is cut over the ranks, and gathered block by block while it is needed.

torch's `fully_shard` is used on every device: Accelerate's own FSDP plugin is ignored on a CPU without a word. As with
its plugin, ranks get batches of their own and gradients are averaged, so that it trains what `ddp` trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as recompute

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.parallel.mesh import MESHES
from jupyter_llmcloud.training.parallel.strategies.alike import begin_alike
from jupyter_llmcloud.training.parallel.strategies.base import Strategy


class FullySharded(Strategy):
    """`fsdp`: over all ranks; `hsdp`: over those of a group, whose groups hold copies."""

    cuts_tensors = True

    def parallelize(self, model: torch.nn.Module, accelerator: Any) -> torch.nn.Module:
        """Cut a model in place."""
        blocks = blocks_of(model, self.plan)
        begin_alike(model, self.plan.text)
        model.to(self.device)
        mesh = MESHES.get(self.plan.mesh(self.world_size), self.device)
        shard(model, blocks, mesh, self.plan.settings, self.device)
        return model


def shard(
    model: torch.nn.Module,
    blocks: list[torch.nn.Module],
    mesh: Any,
    settings: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Cut the blocks of a model, then what is left of it, over the dimensions of the mesh."""
    if settings["recompute"]:
        chosen = set(blocks)
        recompute.apply_activation_checkpointing(model, check_fn=lambda module: module in chosen)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": settings["reshard"]}
    if settings["offload"] and device.type == "cuda":
        options["offload_policy"] = fsdp.CPUOffloadPolicy()
    for block in blocks:
        fsdp.fully_shard(block, **options)
    fsdp.fully_shard(model, **options)


def blocks_of(model: torch.nn.Module, plan: Any) -> list[torch.nn.Module]:
    """The modules that are gathered as a whole, inner ones first. Raises UsageError when the plan names others."""
    wanted, smallest = set(plan.settings["wrap"]), plan.settings["min-params"]
    kinds = {type(module).__name__ for module in model.modules()}
    if unknown := sorted(wanted - kinds):
        own = sorted(kind for kind in kinds if not hasattr(torch.nn, kind))
        raise UsageError(
            f"--plan {plan.text}: this {type(model).__name__} has no module of class {unknown[0]}. "
            f"Its own classes are {', '.join(own) or 'those of torch.nn only'}."
        )
    if smallest:
        return _of_size(model, smallest)
    named = wanted or _undivided(model) & kinds
    if named:
        found = [module for module in model.modules() if type(module).__name__ in named]
    else:
        lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList | torch.nn.Sequential)]
        found = [child for parent in lists for child in parent.children() if not _is_container(child)]
    own_parameters = [module for module in found if module is not model and any(True for _ in module.parameters())]
    return list(dict.fromkeys(reversed(own_parameters)))


def _is_container(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)


def _undivided(model: Any) -> set[str]:
    """What transformers says is not to be divided, also of a model inside an adapter's."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(getattr(inner, "_no_split_modules", None) or ())


def _of_size(model: torch.nn.Module, smallest: int) -> list[torch.nn.Module]:
    """The smallest modules that have so many parameters which no module inside them has."""
    found: list[torch.nn.Module] = []

    def visit(module: torch.nn.Module) -> int:
        left = sum(p.numel() for p in module.parameters(recurse=False)) + sum(map(visit, module.children()))
        if left < smallest or module is model or _is_container(module):
            return left
        found.append(module)
        return 0

    visit(model)
    return found
