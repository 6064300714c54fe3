"""The plans `tp:N` and `tp+fsdp`: layers are cut over neighbouring ranks, which compute one batch together.

How a model may be cut it says itself: transformers' models have a plan (`base_model_tp_plan`, `_tp_plan`), and a module
of one's own may have a dict `tp_plan` of the same form: {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}. It is
carried out by torch's `parallelize_module`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.group.shared_draws import draw_alike
from jupyter_llmcloud.training.parallel.mesh import MESHES
from jupyter_llmcloud.training.parallel.strategies.alike import begin_alike
from jupyter_llmcloud.training.parallel.strategies.fully_sharded import blocks_of, shard
from jupyter_llmcloud.training.parallel.strategies.same_batches import SharingStrategy

_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
}
_KINDS = (torch.nn.Linear, torch.nn.Embedding)


class TensorParallel(SharingStrategy):
    """Every rank of the world has a part of each layer."""

    cuts_tensors = True

    def parallelize(self, model: torch.nn.Module, accelerator: Any) -> torch.nn.Module:
        """Cut a model in place."""
        styles = self.check(model)
        begin_alike(model, self.plan.text)
        model.to(self.device)
        mesh = MESHES.get(self.plan.mesh(self.world_size), self.device)
        self.cut(model, styles, mesh["tp"])
        model.register_forward_pre_hook(self._batches.look, with_kwargs=True)
        return model

    def check(self, model: torch.nn.Module) -> dict[str, ParallelStyle]:
        """By module, how it is cut. Raises UsageError when the model cannot be."""
        plan, size = self.plan.text, self.plan.sizes[0]
        if hasattr(model, "peft_config"):
            raise UsageError(
                f"--plan {plan}: the layers of an adapter are not cut. Adapters are small: say --plan fsdp, or ddp."
            )
        rules = _rules_of(model, plan)
        _check_heads(model, size, plan)
        styles = {}
        for name, module in model.named_modules():
            rule = next((rule for rule in rules if fnmatch.fnmatchcase(name, rule)), None)
            if rule is None:
                continue
            if rules[rule] not in _STYLES or not isinstance(module, _KINDS):
                raise UsageError(
                    f"--plan {plan}: {name} ({type(module).__name__}) is to be cut as {rules[rule]!r}, which is not "
                    f"known for it. Known are {', '.join(_STYLES)}, for Linear and Embedding. Say --plan fsdp instead."
                )
            styles[name] = _STYLES[rules[rule]]()
        if not styles:
            raise UsageError(f"--plan {plan}: the rules of its tp_plan, {', '.join(rules)}, name no module of it.")
        return styles

    def cut(self, model: torch.nn.Module, styles: dict[str, ParallelStyle], mesh: Any) -> None:
        """Cut the modules; parameters that were one stay one."""
        tied = _tied(model)
        parallelize_module(model, mesh, styles)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for first, others in tied:
            for name in others:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, parameters[first])
        draw_alike(self.data_rank[0])  # ranks that hold one activation drop the same of it

    def adopt_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Parameters that are cut and such that are not cannot be updated in one call."""
        for group in optimizer.param_groups:
            for name in ("foreach", "fused"):
                if name in group:
                    group[name] = False


class TensorParallelSharded(TensorParallel):
    """What tensor parallel has cut is cut again over the groups, as `fsdp` does."""

    def parallelize(self, model: torch.nn.Module, accelerator: Any) -> torch.nn.Module:
        """Cut a model in place, twice."""
        blocks = blocks_of(model, self.plan)
        spread = super().parallelize(model, accelerator)
        mesh = MESHES.get(self.plan.mesh(self.world_size), self.device)
        shard(spread, blocks, mesh["shard"], self.plan.settings, self.device)
        return spread


def _rules_of(model: torch.nn.Module, plan: str) -> dict[str, str]:
    found = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not isinstance(found, dict) or not found:
        raise UsageError(
            f"--plan {plan}: {type(model).__name__} does not say how its layers can be cut. Models of transformers "
            'with a base_model_tp_plan do; give one of your own an attribute like tp_plan = {"blocks.*.up": "colwise", '
            '"blocks.*.down": "rowwise"}, or say --plan fsdp, which takes any model.'
        )
    return found


def _check_heads(model: torch.nn.Module, size: int, plan: str) -> None:
    config: Any = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise UsageError(
                f"--plan {plan}: the model's {name} is {heads}, which cannot be shared out evenly over {size} ranks. "
                f"Choose a number that divides {heads}, or --plan fsdp."
            )


def _tied(model: torch.nn.Module) -> list[tuple[str, list[str]]]:
    """Names of parameters that are one, the first and the others."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [(first, others) for first, *others in names.values() if others]
