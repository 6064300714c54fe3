"""Linear layers with weights of 8 or 4 bits; embeddings and the language-model head are in bfloat16, as is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from jupyter_llmcloud.compression.methods.plain import check_plain
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.quantized.packing import (
    PACKED,
    SCALE,
    SHAPE,
    Scheme,
    pack,
    quantize,
    rows_of,
)

_WIDE = 1024  # inputs from which on 128 weights share a scale; fewer weights of 4 bits make a narrow model bad
_GROUP, _GROUP_OF_WIDE = 32, 128


def write_quantized(loaded: LoadedModel, bits: int, folder: Path) -> str:
    """Write the model so; returns a note. Raises ModelError when it has no layers that can be."""
    check_plain(loaded)
    model = loaded.model
    dtype = model.dtype if model.dtype.itemsize <= torch.bfloat16.itemsize else torch.bfloat16
    layers = _linear_layers(model)
    group = 0 if bits == 8 else _group(layers)
    taken = {name: rows for name, rows in layers.items() if not group or rows.shape[1] % group == 0}
    if not taken:
        what = f"whose inputs are a multiple of {_GROUP}" if layers else "besides its language-model head"
        raise ModelError(f"int{bits} is for linear layers, and {type(model).__name__} has none {what}.")
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    scheme = Scheme(bits, group, tuple([*head, *sorted(layers.keys() - taken.keys())]))
    save_file(_tensors(model, taken, scheme, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(model, scheme, dtype, folder)
    grouped = f", one scale for {group}" if group else ", one scale for each row"
    left = f"; {len(layers) - len(taken)} layers are as they were" if len(taken) < len(layers) else ""
    return f"{len(taken)} linear layers with weights of {bits} bits{grouped}{left}{_whole(model, layers)}"


def _whole(model: Any, layers: Mapping[str, torch.Tensor]) -> str:
    """What is said where most weights are in no linear layer, as those of experts, which are one tensor a block."""
    tables = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table}
    matrices = [value for value in model.parameters() if value.dim() > 1 and id(value) not in tables]
    total, linear = sum(value.numel() for value in matrices), sum(rows.numel() for rows in layers.values())
    if 2 * linear >= total:
        return ""
    return f"; {1 - linear / total:.0%} of its weights are in no linear layer (experts and the like) and stay whole"


def _linear_layers(model: Any) -> dict[str, torch.Tensor]:
    """The weights [out, in] of linear layers by the names of these, without the head's."""
    head = model.get_output_embeddings()
    found = {name: rows_of(module) for name, module in model.named_modules() if module is not head}
    return {name: rows for name, rows in found.items() if rows is not None}


def _group(layers: Mapping[str, torch.Tensor]) -> int:
    narrowest = min((rows.shape[1] for rows in layers.values()), default=0)
    fits = all(rows.shape[1] % _GROUP_OF_WIDE == 0 for rows in layers.values())
    return _GROUP_OF_WIDE if narrowest >= _WIDE and fits else _GROUP


@torch.inference_mode()
def _tensors(
    model: Any, layers: Mapping[str, torch.Tensor], scheme: Scheme, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        layer, _, last = name.rpartition(".")
        if layer in layers and last == "weight":
            rows = layers[layer]
            numbers, scale = quantize(rows, scheme, dtype)
            tensors[f"{layer}.{PACKED}"] = pack(numbers, scheme.bits)
            tensors[f"{layer}.{SCALE}"] = scale
            tensors[f"{layer}.{SHAPE}"] = torch.tensor(rows.shape)
        elif id(value) not in seen:  # weights that are tied are written once
            seen.add(id(value))
            tensors[name] = value.detach().to(dtype if value.is_floating_point() else value.dtype).clone().contiguous()
    return tensors


def _write_config(model: Any, scheme: Scheme, dtype: torch.dtype, folder: Path) -> None:
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_bytes())
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = scheme.as_config()
    file.write_text(json.dumps(config, indent=2) + "\n")
