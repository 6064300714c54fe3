"""Heads and rows of MLPs that matter least go, and the configuration says so: what is left is an ordinary model.

What matters is what the rest of the model gets of it on given texts: of a feature that goes into a layer's output
projection, its root mean square times the norm of the weights that read it (Sun et al. 2023, Wanda, equation 1, summed
over outputs). Each layer loses equally many, since a configuration has one number for all of them; heads that share
keys and values go together.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.compression.methods.plain import check_plain
from jupyter_llmcloud.compression.texts import windows
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model

log = logging.getLogger(__name__)

_READ_TOKENS = 16_384  # of the texts
_ROUND = 8  # rows of a wide MLP are left in multiples of it, which is what processors multiply best
_WIDE = 128
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class _Shape:
    """Of every layer: heads, groups of heads that share keys and values, sizes of a head and of the MLP."""

    num_heads: int
    num_groups: int
    head_size: int
    num_rows: int


def prune(loaded: LoadedModel, ratio: float, texts: Sequence[str], folder: Path) -> str:
    """Write the model without this part of its heads and rows; returns a note.

    Raises ModelError for an architecture whose parts are not known, layers that are not alike, and a model too small.
    """
    check_plain(loaded)
    layers = _layers(loaded.model)
    shape = _shape(loaded.model, layers)
    num_groups, num_rows = _left(loaded.model.config.get_text_config(), shape, ratio)
    importance = _importance(loaded, layers, texts)
    for layer, (of_heads, of_rows) in zip(layers, importance, strict=True):
        _cut_heads(layer.self_attn, shape, _largest(of_heads.view(shape.num_groups, -1).sum(dim=1), num_groups))
        _cut_rows(layer.mlp, _largest(of_rows, num_rows))
    config = loaded.model.config.get_text_config()
    _rewrite(config, shape, num_groups, num_rows)
    loaded.model.save_pretrained(folder)
    load_model(folder)  # raises where the configuration does not say all of it
    heads = f"{config.num_attention_heads} of {shape.num_heads} heads"
    return f"{heads} and {num_rows} of {shape.num_rows} rows of each layer's MLP"


def _layers(model: Any) -> list[Any]:
    found = [
        module
        for module in model.modules()
        if all(_has_linear(getattr(module, "self_attn", None), name) for name in _ATTENTION)
        and all(_has_linear(getattr(module, "mlp", None), name) for name in _MLP)
    ]
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not found or len(found) != wanted:
        raise ModelError(
            f"prune knows models whose layers have {', '.join(_ATTENTION)} and {', '.join(_MLP)} (Llama, Mistral, Qwen "
            f"and their kin), and {len(found)} of the {wanted} layers of this {type(model).__name__} do."
        )
    return found


def _has_linear(module: Any, name: str) -> bool:
    return type(getattr(module, name, None)) is torch.nn.Linear


def _shape(model: Any, layers: Sequence[Any]) -> _Shape:
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    num_groups = getattr(config, "num_key_value_heads", None) or num_heads
    shapes = {
        _Shape(num_heads, num_groups, layer.self_attn.q_proj.out_features // num_heads, layer.mlp.down_proj.in_features)
        for layer in layers
    }
    keys = {layer.self_attn.k_proj.out_features for layer in layers}
    if len(shapes) > 1 or keys != {num_groups * next(iter(shapes)).head_size}:
        raise ModelError("prune is even over the layers, and the layers of this model are not alike.")
    return shapes.pop()


def _left(config: Any, shape: _Shape, ratio: float) -> tuple[int, int]:
    """How many groups of heads and rows stay. Raises ModelError when none would go, or none stay."""
    num_groups = shape.num_groups - round(shape.num_groups * ratio)
    num_rows = shape.num_rows - round(shape.num_rows * ratio)
    if shape.num_rows >= _WIDE:
        num_rows = min(round(num_rows / _ROUND) * _ROUND, shape.num_rows)
    if num_groups < 1 or num_rows < 1:
        raise ModelError(
            f"this model is too small for prune:{ratio:g}: of {shape.num_groups} groups of heads and {shape.num_rows} "
            f"rows, {max(num_groups, 0)} and {max(num_rows, 0)} would be left."
        )
    num_groups = _nearest(config, shape, num_groups)
    if (num_groups, num_rows) == (shape.num_groups, shape.num_rows):
        raise ModelError(
            f"this model is too small for prune:{ratio:g}: it has {shape.num_groups} groups of heads and "
            f"{shape.num_rows} rows, and that part of them is less than one."
        )
    return num_groups, num_rows


def _nearest(config: Any, shape: _Shape, wanted: int) -> int:
    """So many groups, or the nearest number that the architecture takes: Llama's heads must divide the hidden size."""
    by_distance = sorted(range(1, shape.num_groups + 1), key=lambda number: (abs(number - wanted), -number))
    return next((number for number in by_distance if _is_taken(config, shape, number)), shape.num_groups)


def _is_taken(config: Any, shape: _Shape, num_groups: int) -> bool:
    told = copy.deepcopy(config)
    try:
        _rewrite(told, shape, num_groups, shape.num_rows)
        type(config).from_dict(told.to_dict())
    except Exception as error:  # each architecture checks its configuration in a way of its own
        log.info("%d groups of heads are not possible: %s", num_groups, error)
        return False
    return True


@torch.inference_mode()
def _importance(
    loaded: LoadedModel, layers: Sequence[Any], texts: Sequence[str]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer: of every feature that its attention gives out, and of every row of its MLP."""
    projections = [[layer.self_attn.o_proj, layer.mlp.down_proj] for layer in layers]
    with _squares([linear for pair in projections for linear in pair]) as sums:
        length = min(loaded.context_length, 512)
        for tokens in windows(texts, loaded.tokenizer, length, _READ_TOKENS):
            loaded.model(input_ids=torch.tensor([tokens], device=loaded.model.device), use_cache=False)
        if not sums:
            raise ModelError("the text that pruning looks at has no tokens.")
        return [tuple(sums[linear].sqrt() * _norms(linear) for linear in pair) for pair in projections]  # type: ignore[misc]


def _norms(linear: torch.nn.Linear) -> torch.Tensor:
    return linear.weight.detach().float().norm(dim=0)


@contextmanager
def _squares(linears: Sequence[torch.nn.Linear]) -> Iterator[dict[torch.nn.Linear, torch.Tensor]]:
    """The sums of squares of what goes into these layers within the block."""
    sums: dict[torch.nn.Linear, torch.Tensor] = {}

    def add(linear: torch.nn.Linear, given: Any) -> None:
        squares = given[0].detach().float().square().flatten(0, -2).sum(dim=0)
        sums[linear] = sums[linear] + squares if linear in sums else squares

    hooks = [linear.register_forward_pre_hook(add) for linear in linears]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _largest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Where the largest are, in the order in which they stand."""
    return importance.topk(count).indices.sort().values


def _cut_heads(attention: Any, shape: _Shape, groups: torch.Tensor) -> None:
    queries = _features(groups, shape.num_heads // shape.num_groups * shape.head_size)
    keys = _features(groups, shape.head_size)
    _keep_outputs(attention.q_proj, queries)
    _keep_outputs(attention.k_proj, keys)
    _keep_outputs(attention.v_proj, keys)
    _keep_inputs(attention.o_proj, queries)


def _cut_rows(mlp: Any, rows: torch.Tensor) -> None:
    _keep_outputs(mlp.gate_proj, rows)
    _keep_outputs(mlp.up_proj, rows)
    _keep_inputs(mlp.down_proj, rows)


def _features(groups: torch.Tensor, size: int) -> torch.Tensor:
    return (groups.unsqueeze(1) * size + torch.arange(size)).flatten()


def _keep_outputs(linear: torch.nn.Linear, places: torch.Tensor) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.detach()[places].clone())
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(linear.bias.detach()[places].clone())
    linear.out_features = len(places)


def _keep_inputs(linear: torch.nn.Linear, places: torch.Tensor) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.detach()[:, places].clone())
    linear.in_features = len(places)


def _rewrite(config: Any, shape: _Shape, num_groups: int, num_rows: int) -> None:
    """`head_dim` is said, since it is not the hidden size divided by the heads any more."""
    config.head_dim = shape.head_size
    config.num_attention_heads = num_groups * (shape.num_heads // shape.num_groups)
    config.num_key_value_heads = num_groups
    config.intermediate_size = num_rows
