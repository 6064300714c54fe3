"""The mean over all ranks of a vector that travels as 8-bit integers, a scale for each block of them.

As an all-reduce by two steps: every rank gets its stretch of all vectors, averages it and sends the mean to all. Both
are quantised, so that a rank sends 2(n-1)/n bytes for a value where float32 takes four times as many. The result is the
same on every rank, bit by bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

BLOCK = 256  # values with one scale
_LEVELS = 127


def quantized_mean(vector: torch.Tensor) -> torch.Tensor:
    """Of a flat float32 vector, the same length on all ranks, which all must call it."""
    num_ranks, length = dist.get_world_size(), vector.numel()
    stretch = -(-length // (num_ranks * BLOCK)) * BLOCK
    padded = torch.nn.functional.pad(vector, (0, stretch * num_ranks - length))
    values, scales = quantize(padded)
    got_values, got_scales = torch.empty_like(values), torch.empty_like(scales)
    dist.all_to_all_single(got_values, values)
    dist.all_to_all_single(got_scales, scales)
    own = dequantize(got_values, got_scales).view(num_ranks, stretch).mean(0)
    values, scales = quantize(own)
    all_values, all_scales = values.new_empty(stretch * num_ranks), scales.new_empty(scales.numel() * num_ranks)
    dist.all_gather_into_tensor(all_values, values)
    dist.all_gather_into_tensor(all_scales, scales)
    return dequantize(all_values, all_scales)[:length]


def quantize(vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As int8 and a float32 scale a block; the length is a multiple of BLOCK. What is not finite stays so."""
    blocks = vector.view(-1, BLOCK)
    scales = blocks.abs().amax(1) / _LEVELS
    values = torch.where(scales[:, None] > 0, blocks / scales[:, None], 0.0).nan_to_num(0.0)
    return values.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8).view(-1), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `quantize`, up to half a scale a value."""
    return (values.view(-1, BLOCK).to(scales.dtype) * scales[:, None]).view(-1)
