"""A linear layer whose weights are whole numbers with scales. What is multiplied with them stays a floating number.

Each row of a batch has the result that it would have alone: no scale is taken from what else is in the batch. torch's
products with such weights are fast for bfloat16, and several times slower than those of plain weights for float32: a
model that is to compute in float32 gets plain weights (`plain_linear`).
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from jupyter_llmcloud.inference.engines.quantized.packing import Scheme, dequantize, quantize
from jupyter_llmcloud.system.patching import Patch

log = logging.getLogger(__name__)

_FEW_ROWS = 32  # with more, it is faster to make floating numbers of the weights, and multiply as usual
_FAST = (torch.bfloat16, torch.float16)
_GROUPS = (32, 64, 128, 256)  # that torch's product of 4-bit weights knows
_ROUNDING = 2e-2
_TILES = 1  # of the inner dimension; what a CPU takes
# Nothing of it is replaced, but torch keeps these for its own compiler and for torchao.
KERNELS = Patch(
    feature="Products with 8-bit and 4-bit weights",
    why="torch.nn.functional.linear knows no weights of whole numbers.",
    without="Quantized models are served from weights that each step makes of the numbers, which is slow.",
    checked="torch 2.6 to 2.13",
    targets={
        "torch:ops.aten._weight_int8pack_mm": None,
        "torch:ops.aten._weight_int4pack_mm_for_cpu": None,
        "torch:ops.aten._convert_weight_to_int4pack_for_cpu": None,
    },
)


class QuantizedLinear(torch.nn.Module):
    """Stands for a torch.nn.Linear.

    Args:
        numbers: int8 [out, in].
        scale: [out, groups], of the type that is computed with.
        bits: 4 or 8: numbers of 4 bits are kept as such where torch multiplies with them.

    Attributes:
        numbers: as they are computed with: int8 [out, in], or packed.
        num_unseen: how many weights it has more than its parameters have numbers.
    """

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int) -> None:
        super().__init__()
        self.out_features, self.in_features = numbers.shape
        self.bits = bits
        self.numbers = torch.nn.Parameter(numbers, requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.is_packed = False
        if bits == 4 and has_kernel(4, numbers.shape[1] // scale.shape[1], scale.dtype, numbers.device.type):
            self._pack()
        self.num_unseen = numbers.numel() - self.numbers.numel() - self.scale.numel()

    def _pack(self) -> None:
        whole = self.numbers.to(torch.int32) + 8
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, _TILES)
        with_zeros = torch.stack([self.scale, torch.zeros_like(self.scale)], dim=-1).transpose(0, 1).contiguous()
        self.numbers = torch.nn.Parameter(packed, requires_grad=False)
        self.scale = torch.nn.Parameter(with_zeros, requires_grad=False)
        self.is_packed = True

    @property
    def weight(self) -> torch.Tensor:
        """What the numbers stand for, [out, in]: some architectures ask for its type, or compute with it themselves."""
        return UnmadeWeight(self)

    def made_weight(self) -> torch.Tensor:
        """The same, made of the numbers."""
        if not self.is_packed:
            return dequantize(self.numbers, self.scale)
        ones = torch.eye(self.in_features, dtype=self.scale.dtype, device=self.scale.device)
        return self._four_bit(ones).T.contiguous()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        flat = rows.reshape(-1, self.in_features)
        product = self._four_bit(flat) if self.is_packed else self._eight_bit(flat)
        if self.bias is not None:
            product = product.add_(self.bias)
        return product.view(*rows.shape[:-1], self.out_features)

    def _four_bit(self, rows: torch.Tensor) -> torch.Tensor:
        group = self.in_features // self.scale.shape[0]
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), self.numbers, group, self.scale
        )
        return product

    def _eight_bit(self, rows: torch.Tensor) -> torch.Tensor:
        by_row = self.scale.shape[1] == 1
        if not by_row:
            return linear(rows, dequantize(self.numbers, self.scale))
        scale = self.scale.view(-1)
        if len(rows) <= _FEW_ROWS and has_kernel(8, 0, rows.dtype, rows.device.type):
            product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.numbers, scale)
            return product
        # Many CPUs multiply bfloat16 several times slower than float32, and the numbers are exact in both.
        dtype = torch.float32 if rows.device.type == "cpu" else rows.dtype
        return linear(rows.to(dtype), self.numbers.to(dtype)).mul_(scale).to(rows.dtype)


class UnmadeWeight(torch.Tensor):
    """Weights that are made only where something is computed with them.

    T5 asks each of its layers for the type of one in every step: to make the weights of packed numbers for that takes
    as long as dozens of steps.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, layer: QuantizedLinear) -> UnmadeWeight:
        of = layer.scale
        size = (layer.out_features, layer.in_features)
        made: UnmadeWeight = torch.Tensor._make_wrapper_subclass(cls, size, dtype=of.dtype, device=of.device)
        return made

    def __init__(self, layer: QuantizedLinear) -> None:
        self._layer = layer

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Whatever is computed is computed with the weights."""
        args, kwargs = tree_map_only(cls, lambda one: one._layer.made_weight(), (args, kwargs or {}))
        return function(*args, **kwargs)


@cache
def has_kernel(bits: int, group: int, dtype: torch.dtype, device: str) -> bool:
    """Whether torch multiplies with such weights here, and right: tried, with a small matrix."""
    if device != "cpu" or dtype not in _FAST or KERNELS.problem() is not None:
        return False
    if bits == 4 and group not in _GROUPS:
        return False
    try:
        with torch.inference_mode():
            return _is_right(bits, group or 64, dtype)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        log.info("torch has no product of %d-bit weights and %s here: %s", bits, dtype, error)
        return False


def _is_right(bits: int, group: int, dtype: torch.dtype) -> bool:
    size = 2 * group
    weight = torch.linspace(-1, 1, 64 * size).sin().mul(37).cos().view(64, size)
    numbers, scale = quantize(weight, Scheme(bits, group if bits == 4 else 0), dtype)
    rows = torch.linspace(-2, 1, 3 * size).cos().view(3, size).to(dtype)
    expected = rows.float() @ dequantize(numbers, scale.float()).T
    if bits == 4:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.to(torch.int32) + 8, _TILES)
        zeros = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()
        found: Any = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, zeros)
    else:
        found = torch.ops.aten._weight_int8pack_mm(rows, numbers, scale.view(-1))
    return float((found.float() - expected).abs().max()) <= _ROUNDING * float(expected.abs().max())


def plain_linear(numbers: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    """A linear layer with the weights that the numbers stand for, of the type of the scales."""
    layer = torch.nn.Linear(numbers.shape[1], numbers.shape[0], bias=bias is not None, device="meta")
    layer.weight = torch.nn.Parameter(dequantize(numbers, scale), requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer
