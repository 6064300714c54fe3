"""The plan `pipeline:N`: each rank has a stage of the layers, and a batch goes through them in microbatches (GPipe).

The schedules of `torch.distributed.pipelining` run forward and backward in one call, with a loss that they are handed;
an ordinary loop computes its loss where it likes and calls backward itself. So `model(...)` sends the microbatches
forward here, over torch's point-to-point calls, and the loss that it returns sends their gradients back when the loop
calls backward: whatever the loop multiplies it by, and wherever it comes from.

Stages can be made of a `torch.nn.Sequential`, and of causal language models of transformers that have a pipeline plan.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from jupyter_llmcloud.core.parallel.outer_schedule import fragments_of
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.group.shared_draws import draw_alike
from jupyter_llmcloud.training.parallel.strategies.alike import begin_alike
from jupyter_llmcloud.training.parallel.strategies.microbatches import Outputs, PipelinedModel, Stage
from jupyter_llmcloud.training.parallel.strategies.same_batches import SharingStrategy

_IGNORED = -100  # a label that the loss leaves out


class Pipeline(SharingStrategy):
    """Every rank of the world is a stage."""

    def parallelize(self, model: nn.Module, accelerator: Any) -> nn.Module:
        plan, number = self.plan.text, self.plan.sizes[0]
        stage_of: Any = _sequential if isinstance(model, nn.Sequential) else _causal_lm
        begin_alike(model, plan)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        stage = stage_of(model, self.rank, number, plan)
        model.to(self.device)
        draw_alike(self.data_rank[0])
        pipelined = PipelinedModel(model, stage, shapes, self.plan.settings["microbatches"] or number)
        pipelined.register_forward_pre_hook(self._batches.look, with_kwargs=True)
        return pipelined

    def total_norm(self, norm: torch.Tensor, norm_type: float) -> torch.Tensor:
        """Of the gradients of all stages, from that of this one."""
        if norm_type == float("inf"):
            dist.all_reduce(norm, dist.ReduceOp.MAX)
            return norm
        power = norm**norm_type
        dist.all_reduce(power)
        return power ** (1 / norm_type)


class PassThrough(nn.Module):
    """Stands for a layer that another stage has; it keeps what the layer says of itself in plain values."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, str | int | bool)}
        self.__dict__.update({name: value for name, value in plain.items() if name not in vars(self)})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Its first input."""
        return args[0] if args else next(iter(kwargs.values()))


def _check_number(layers: list[nn.Module], number: int, plan: str, kind: str) -> None:
    if len(layers) < number:
        raise UsageError(f"--plan {plan}: this {kind} has {len(layers)} layers, too few for {number} stages.")


def _sequential(model: nn.Sequential, rank: int, number: int, plan: str) -> Stage:
    layers = list(model)
    _check_number(layers, number, plan, "Sequential")
    _refuse_shared(model, plan)
    parts = fragments_of([sum(p.numel() for p in layer.parameters()) + 1 for layer in layers], number)
    for at, layer in enumerate(layers):
        if at not in parts[rank]:
            model[at] = PassThrough(layer)
    return _StageOfLayers(model)


class _StageOfLayers(Stage):
    def __init__(self, model: nn.Sequential) -> None:
        self._model = model

    def inner(self, hidden: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        found: torch.Tensor = self._model(*args) if hidden is None else self._model(hidden)
        return found

    def last(
        self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], whole: dict[str, Any]
    ) -> Outputs:
        return Outputs(result=self._model(hidden))


# --- causal language models of transformers ---------------------------------------------------------------------------


def _causal_lm(model: nn.Module, rank: int, number: int, plan: str) -> Stage:
    kind = type(model).__name__
    base: Any = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    parts = ("embed_tokens", "layers", "norm")
    can = getattr(getattr(model, "config", None), "base_model_pp_plan", None) and kind.endswith("ForCausalLM")
    if not can or base is None or not all(hasattr(base, part) for part in parts) or not hasattr(model, "lm_head"):
        raise UsageError(
            f"--plan {plan}: a {kind} cannot be cut into stages. A torch.nn.Sequential can, and so can causal language "
            "models of transformers that have a base_model_pp_plan, such as Llama, Qwen and Mistral. For others say "
            "--plan fsdp."
        )
    _refuse_shared(model, plan)
    layers = list(base.layers)
    _check_number(layers, number, plan, kind)
    _check_base(model, base, plan)
    size, rest = divmod(len(layers), number)
    first = rank * size + min(rank, rest)
    own = range(first, first + size + (rank < rest))
    for at, layer in enumerate(layers):
        if at not in own:
            base.layers[at] = PassThrough(layer)
    if rank > 0:
        base.embed_tokens = PassThrough(base.embed_tokens)
    if rank < number - 1:
        base.norm, model.lm_head = PassThrough(base.norm), PassThrough(model.get_submodule("lm_head"))
    return _StageOfLM(model, base)


def _refuse_shared(model: nn.Module, plan: str) -> None:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := names.setdefault(id(parameter), name)) != name:
            raise UsageError(
                f"--plan {plan}: {other} and {name} are one parameter, which would be on two stages. Untie them "
                "(tie_word_embeddings=False), or say --plan fsdp."
            )


def _check_base(model: Any, base: Any, plan: str) -> None:
    """Refuse a model that does more to what goes through it than its layers do: a stage would do it again."""
    bare = copy.copy(base)
    bare._modules = {**base._modules, "norm": PassThrough(base.norm), "embed_tokens": PassThrough(base.embed_tokens)}
    bare._modules["layers"] = nn.ModuleList(PassThrough(layer) for layer in base.layers)
    parameter = next(base.parameters())
    hidden = torch.ones(1, 3, model.config.hidden_size, dtype=parameter.dtype, device=parameter.device)
    with torch.no_grad():
        through = bare(inputs_embeds=hidden, use_cache=False).last_hidden_state
    if not torch.equal(through, hidden):
        raise UsageError(
            f"--plan {plan}: a {type(model).__name__} changes what goes through it beside its layers, and each stage "
            "would do so again. Say --plan fsdp."
        )


class _StageOfLM(Stage):
    def __init__(self, model: Any, base: Any) -> None:
        self._model, self._base = model, base

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, the first of which is input_ids."""
        return {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs, "use_cache": False}

    def inner(self, hidden: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        named = {name: value for name, value in self.named(args, kwargs).items() if name != "labels"}
        if hidden is not None:
            named = {**named, "input_ids": None, "inputs_embeds": hidden}
        found: torch.Tensor = self._base(**named).last_hidden_state
        return found

    def last(
        self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], whole: dict[str, Any]
    ) -> Outputs:
        named = {**self.named(args, kwargs), "input_ids": None, "inputs_embeds": hidden}
        if (labels := whole.get("labels")) is None:
            return Outputs(result=self._model(**named).logits, kind="logits")
        # The mean over the tokens of the batch, not of means over microbatches.
        count = whole.get("num_items_in_batch", (labels[..., 1:] != _IGNORED).sum())
        found = self._model(**{**named, "num_items_in_batch": count})
        return Outputs(result=found.logits, loss=found.loss, kind="logits")
