"""Weights as whole numbers with scales, and how they lie in files: the layout `pack-quantized` of compressed-tensors.

    weight_packed  int32 [out, in * bits / 32]  numbers from 0 on, the first in the lowest bits
    weight_scale   [out, in / group]            a weight is its number times this; one a row without groups
    weight_shape   int64 [2]                    out, in

vLLM reads the same files, and so does transformers where the package compressed-tensors is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
_BITS = (4, 8)


@dataclass(frozen=True)
class Scheme:
    """How the linear layers of a model are written.

    Attributes:
        bits: of a weight: 4 or 8.
        group: how many weights of a row share a scale; 0: all of a row.
        ignored: names of the linear layers that are as they were.
    """

    bits: int
    group: int = 0
    ignored: tuple[str, ...] = ()

    @property
    def offset(self) -> int:
        """What is added to a number in the file, so that none is negative."""
        return 1 << (self.bits - 1)

    def as_config(self) -> dict[str, Any]:
        """As config.json has it."""
        strategy = {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": list(self.ignored),
        }

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Scheme | None:
        """What a config.json says under `quantization_config`; None for what is not read here."""
        groups = list((config.get("config_groups") or {}).values())
        if config.get("quant_method") != METHOD or config.get("format") != FORMAT or len(groups) != 1:
            return None
        weights, ignored = groups[0].get("weights") or {}, tuple(map(str, config.get("ignore") or ()))
        is_known = (
            groups[0].get("targets") == ["Linear"]
            and not groups[0].get("input_activations")
            and not groups[0].get("output_activations")
            and weights.get("num_bits") in _BITS
            and weights.get("type") == "int"
            and weights.get("symmetric") is True
            and not weights.get("actorder")
            and weights.get("strategy") in ("channel", "group")
            and not config.get("kv_cache_scheme")
            and not config.get("transform_config")  # rotations that go before and after the weights
        )
        group = int(weights.get("group_size") or 0) if weights.get("strategy") == "group" else 0
        return cls(int(weights["num_bits"]), group, ignored) if is_known else None


def rows_of(layer: torch.nn.Module) -> torch.Tensor | None:
    """The weight [out, in] of a linear layer, or of GPT-2's Conv1D, which holds its transpose; None of any other."""
    from transformers.pytorch_utils import Conv1D

    weight: Any = getattr(layer, "weight", None)
    if type(layer) is torch.nn.Linear:
        return weight
    return weight.t() if type(layer) is Conv1D else None


def quantize(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (int8, [out, in]) and scales ([out, groups], of this type) whose products are nearest to a weight."""
    out, size = weight.shape
    rows = weight.detach().float().reshape(out, -1, scheme.group or size)
    most = scheme.offset - 1
    largest = rows.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scale = _best_scale(rows, largest / most, most) if scheme.bits < 8 else largest / most
    scale = scale.to(dtype).float()  # the numbers are those for the scale that is written
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    numbers = (rows / scale).round().clamp(-most - 1, most).to(torch.int8)
    return numbers.view(out, size), scale.squeeze(-1).to(dtype)


def _best_scale(rows: torch.Tensor, scale: torch.Tensor, most: int) -> torch.Tensor:
    """Of several smaller ones, that with the least squared error: to cut off the largest weights is worth it."""
    best, least = scale, _error(rows, scale, most)
    for percent in range(98, 60, -2):
        smaller = scale * (percent / 100)
        error = _error(rows, smaller, most)
        best, least = torch.where(error < least, smaller, best), torch.minimum(error, least)
    return best


def _error(rows: torch.Tensor, scale: torch.Tensor, most: int) -> torch.Tensor:
    numbers = (rows / scale).round().clamp(-most - 1, most)
    return (numbers * scale - rows).square().sum(dim=-1, keepdim=True)


def dequantize(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] that numbers and scales stand for."""
    out, size = numbers.shape
    return (numbers.view(out, scale.shape[1], -1).to(scale.dtype) * scale.unsqueeze(-1)).view(out, size)


def pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [out, in] as the file has it. Rows are filled up with zeros to whole words."""
    per_word = 32 // bits
    shifted = numbers.to(torch.int32) + (1 << (bits - 1))
    shifted = torch.nn.functional.pad(shifted, (0, -shifted.shape[1] % per_word)).view(len(shifted), -1, per_word)
    words = torch.zeros(shifted.shape[:2], dtype=torch.int32)
    for place in range(per_word):
        words |= shifted[:, :, place] << (bits * place)
    return words


def unpack(words: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """int8 [out, size] of what the file has."""
    per_word = 32 // bits
    places = torch.arange(per_word, dtype=torch.int32) * bits
    numbers = (words.unsqueeze(-1) >> places) & ((1 << bits) - 1)
    return (numbers.view(len(words), -1)[:, :size] - (1 << (bits - 1))).to(torch.int8)
