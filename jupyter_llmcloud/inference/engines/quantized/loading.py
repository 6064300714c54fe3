"""A folder with quantized weights to a model whose linear layers compute with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.quantized.linear import QuantizedLinear, plain_linear
from jupyter_llmcloud.inference.engines.quantized.packing import PACKED, SCALE, SHAPE, Scheme, rows_of, unpack

_SUFFIXES = (PACKED, SCALE, SHAPE)


def scheme_of(folder: Path) -> Scheme | None:
    """How its weights are quantized; None: they are not, or in a way that transformers itself must know."""
    config = json.loads((folder / "config.json").read_bytes())
    return Scheme.of_config(config.get("quantization_config") or {})


def load_quantized(auto: Any, folder: Path, config: Any, scheme: Scheme, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The model, and what its files lack or have too much, as `from_pretrained` reports it.

    Args:
        auto: the class of transformers that makes the model of its configuration.
        dtype: "auto", or what is computed with: with "float32" the weights become plain ones, as large as they were.
    """
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    saved = _tensors(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    chosen = _saved_dtype(config, saved) if dtype == "auto" else getattr(torch, dtype)
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=chosen, attn_implementation="sdpa")
    quantized = {name.rpartition(".")[0] for name in saved if name.endswith(f".{PACKED}")}
    misfits = _put_in(model, saved, quantized, scheme, chosen)
    plain = {name: _as(value, chosen) for name, value in saved.items() if _layer(name) not in quantized}
    misfits += _mismatched(model, plain)
    plain = {name: value for name, value in plain.items() if name not in {row[0] for row in misfits}}
    missing, unexpected = model.load_state_dict(plain, strict=False, assign=True)
    # A head of its own stays one, also where the configuration says that it is that of the embeddings.
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    lost = [name for name, value in model.state_dict(keep_vars=True).items() if value.is_meta]
    report = {
        "missing_keys": [name for name in missing if name in lost],
        "unexpected_keys": [*unexpected],
        "mismatched_keys": misfits,
    }
    return model, report


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    saved: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        saved |= load_file(file)
    return saved


def _saved_dtype(config: Any, saved: Mapping[str, torch.Tensor]) -> torch.dtype:
    found = getattr(config, "dtype", None)
    if isinstance(found, torch.dtype):
        return found
    return next((value.dtype for value in saved.values() if value.is_floating_point()), torch.float32)


def _layer(name: str) -> str:
    """The layer that a quantized tensor belongs to; "" for other tensors."""
    layer, _, last = name.rpartition(".")
    return layer if last in (*_SUFFIXES, "bias") else ""


def _as(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _put_in(
    model: Any, saved: Mapping[str, torch.Tensor], layers: set[str], scheme: Scheme, dtype: torch.dtype
) -> list[tuple[str, Any, Any]]:
    """Replace the linear layers of these names; returns those whose shapes do not fit."""
    misfits = []
    for layer in sorted(layers):
        try:
            linear = model.get_submodule(layer)
        except AttributeError:
            raise ModelError(f"it holds a quantized layer {layer!r} that its config.json does not know.") from None
        words, scale, shape = (saved.get(f"{layer}.{suffix}") for suffix in _SUFFIXES)
        rows = rows_of(linear)
        if rows is None or words is None or scale is None or shape is None:
            raise ModelError(f"its quantized layer {layer!r} is not complete, or no linear layer of the model.")
        wanted = tuple(rows.shape)
        found = tuple(int(size) for size in shape)
        scales = _shape_of_scales(layer, wanted, scheme.group)
        if found != wanted or tuple(scale.shape) != scales:
            wrong = (PACKED, found, wanted) if found != wanted else (SCALE, tuple(scale.shape), scales)
            misfits.append((f"{layer}.{wrong[0]}", *wrong[1:]))
            continue
        bias = saved.get(f"{layer}.bias")
        numbers = unpack(words, scheme.bits, wanted[1])
        made = _linear(numbers, scale.to(dtype), None if bias is None else bias.to(dtype), scheme.bits)
        parent, _, name = layer.rpartition(".")
        setattr(model.get_submodule(parent), name, made)
    return misfits


def _shape_of_scales(layer: str, shape: tuple[int, ...], group: int) -> tuple[int, int]:
    if group and shape[1] % group:
        raise ModelError(
            f"its quantized layer {layer!r} has {shape[1]} inputs, which are no multiple of the {group} that share a "
            "scale."
        )
    return shape[0], shape[1] // group if group else 1


def _linear(numbers: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int) -> torch.nn.Module:
    if scale.dtype == torch.float32:
        return plain_linear(numbers, scale, bias)
    return QuantizedLinear(numbers, scale, bias, bits)


def _mismatched(model: Any, saved: Mapping[str, torch.Tensor]) -> list[tuple[str, Any, Any]]:
    own = model.state_dict(keep_vars=True)
    return [
        (name, tuple(value.shape), tuple(own[name].shape))
        for name, value in saved.items()
        if name in own and own[name].shape != value.shape
    ]
