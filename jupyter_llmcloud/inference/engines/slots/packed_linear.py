"""Linear layers whose weights are laid out for oneDNN, once, instead of at every call.

oneDNN's kernels give every row of a batch the same result, bit for bit, however many rows there are, and a call of
them has a fixed price of some 20 microseconds. A single row is a product of a matrix and a vector, which is bound by
reading the weights. The BLAS does it as fast as memory allows: where outputs are many and inputs few, only if the
weights stand by inputs (one column of the layer after the other). Its result differs from oneDNN's by rounding.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn.functional import linear

from jupyter_llmcloud.system.patching import Patch

log = logging.getLogger(__name__)

_FOR_ROWS = 8  # the layout is the same for any number of rows but one
_FEW_INPUTS = 1024  # beyond, the BLAS reads weights that stand by outputs nearly as fast, and the copy would be large
# Nothing of it is replaced, but torch keeps these for its own compiler.
PACKING = Patch(
    feature="Packing of weights for the CPU",
    why="torch.nn.functional.linear lays the weights out anew at every call.",
    without="Serving on a CPU is slower from two sequences on.",
    checked="torch 2.6 to 2.13",
    targets={
        "torch:ops.mkldnn._reorder_linear_weight": None,
        "torch:ops.mkldnn._linear_pointwise.default": None,
        "torch:ops.mkldnn._linear_pointwise.binary": None,
    },
)


def why_not_packed(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why weights cannot be packed here; None when they can: tried, with a small matrix."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"weights are {dtype} on {device.type}, and only float32 on a CPU is packed"
    if problem := PACKING.problem():
        return problem
    try:
        weight = torch.linspace(-1, 1, 48 * 32).view(48, 32)
        layer = Packed(weight, None)
        for rows in (torch.linspace(-2, 1, 5 * 32).view(5, 32), torch.linspace(-2, 1, 32).view(1, 32)):
            expected = linear(rows, weight)
            both = torch.stack([layer(rows), layer.add_to(expected, rows)])
            if not torch.allclose(both, torch.stack([expected, 2 * expected]), atol=1e-3):
                return "oneDNN's result is not that of a linear layer"
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class Packed:
    """A weight [out, in] in oneDNN's layout, with its bias, and as a single row reads it.

    Attributes:
        weight: in that layout, which only oneDNN knows.
        by_inputs: [in, out].
        bias: [out], or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        weight = weight.detach()
        size_out, self.size_in = weight.shape
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _FOR_ROWS)
        by_inputs = size_out > self.size_in and self.size_in <= _FEW_INPUTS
        self.by_inputs = weight.t().contiguous() if by_inputs else weight.t()
        self.bias = None if bias is None else bias.detach()
        self._plain = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if rows.numel() > self.size_in:
            return self._plain(rows, self.weight, self.bias, "none", [], "")
        product = rows.matmul(self.by_inputs)
        return product if self.bias is None else product.add_(self.bias)

    def add_to(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The same of [n, in], added to [n, out]."""
        if rows.numel() > self.size_in:
            return self._binary(rows, residual, self.weight, self.bias, "add")
        added = torch.addmm(residual, rows, self.by_inputs)
        return added if self.bias is None else added.add_(self.bias)


class PackedLinear(torch.nn.Module):
    """Stands for a torch.nn.Linear, whose weight it shares; or for transformers' Conv1D, its transpose."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias
        self._packed = Packed(weight, bias)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        return self._packed(rows)


def pack_linears(model: torch.nn.Module) -> int:
    """Replace the linear layers of a model; how many there were."""
    from transformers.pytorch_utils import Conv1D

    num_packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            stand_in: Any = None
            if type(child) is torch.nn.Linear:
                stand_in = PackedLinear(child.weight.detach(), child.bias)
            elif type(child) is Conv1D:
                stand_in = PackedLinear(child.weight.detach().t(), child.bias)
            if stand_in is not None:
                setattr(parent, name, stand_in)
                num_packed += 1
    return num_packed
