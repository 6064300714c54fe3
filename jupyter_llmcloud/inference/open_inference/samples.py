"""An example of what a module can be asked with, for whoever is shown how to ask it; tried before it is shown."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch

PLACEHOLDER = "NUMBERS IN LISTS"
MAX_SHOWN = 64  # numbers
_MAX_LAYERS = 8
_SIDES = (8, 16, 28, 32, 64, 96, 224)  # of pictures


def sample_of(module: torch.nn.Module, required: Sequence[str]) -> str:
    """JSON that stands for `inputs` in a request: what its forward takes, or a word for it where nobody can tell."""
    if len(required) > 1:
        return json.dumps(dict.fromkeys(required, PLACEHOLDER))
    shape = next((shape for shape, dtype in _candidates(module) if _takes(module, shape, dtype)), None)
    if shape is None:
        return json.dumps(PLACEHOLDER)
    if math.prod(shape) > MAX_SHOWN:
        return json.dumps(f"{PLACEHOLDER}, OF SHAPE {' x '.join(map(str, shape))}")
    return json.dumps(torch.zeros(shape, dtype=torch.int64 if _first_is_ids(module) else torch.float32).tolist())


def _first_is_ids(module: torch.nn.Module) -> bool:
    return isinstance(next(_leaves(module), None), torch.nn.Embedding | torch.nn.EmbeddingBag)


def _leaves(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (layer for layer in module.modules() if not list(layer.children()))


def _candidates(module: torch.nn.Module) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes that its layers would take, those of the first ones first."""
    if _first_is_ids(module):
        yield (1, 4), torch.int64
        return
    weights = (weight.dtype for weight in module.parameters() if weight.is_floating_point())
    dtype = next(weights, torch.float32)
    for layer in islice(_leaves(module), _MAX_LAYERS):
        for shape in _shapes(layer):
            yield shape, dtype


def _shapes(layer: torch.nn.Module) -> list[tuple[int, ...]]:
    match layer:
        case torch.nn.Linear():
            return [(1, layer.in_features), (1, 4, layer.in_features)]
        case torch.nn.Conv1d():
            return [(1, layer.in_channels, side) for side in _SIDES]
        case torch.nn.Conv2d():
            return [(1, layer.in_channels, side, side) for side in _SIDES]
        case torch.nn.RNNBase():
            return [(1, 4, layer.input_size)]
        case torch.nn.LayerNorm():
            return [(1, *layer.normalized_shape)]
        case torch.nn.BatchNorm1d():
            return [(1, layer.num_features)]
        case torch.nn.BatchNorm2d():
            return [(1, layer.num_features, side, side) for side in _SIDES]
    return []


def _takes(module: torch.nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether its forward comes to an end with this; on the meta device nothing is computed."""
    state = {name: value.to("meta") for name, value in (*module.named_parameters(), *module.named_buffers())}
    with contextlib.suppress(Exception), torch.inference_mode():
        torch.func.functional_call(module, state, (torch.zeros(shape, dtype=dtype, device="meta"),))
        return True
    return False
