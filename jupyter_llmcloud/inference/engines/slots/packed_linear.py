"""Linear layers whose weights are laid out for oneDNN, once, instead of at every call.

oneDNN's kernels give every row of a batch the same result, bit for bit, however many rows there are. A single row is
left to the BLAS, which reads the plain weights as fast as memory allows and has less to prepare; its result differs
from the others' by rounding.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn.functional import linear

from jupyter_llmcloud.system.patching import Patch

log = logging.getLogger(__name__)

_FOR_ROWS = 8  # the layout is the same for any number of rows but one
# Nothing of it is replaced, but torch keeps these for its own compiler.
PACKING = Patch(
    feature="Packing of weights for the CPU",
    why="torch.nn.functional.linear lays the weights out anew at every call.",
    without="Serving on a CPU is slower from two sequences on.",
    checked="torch 2.6 to 2.13",
    targets={
        "torch:ops.mkldnn._reorder_linear_weight": None,
        "torch:ops.mkldnn._linear_pointwise": None,
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
        weight, rows = torch.linspace(-1, 1, 48 * 32).view(48, 32), torch.linspace(-2, 1, 5 * 32).view(5, 32)
        packed = Packed(weight, None)
        expected = linear(rows, weight)
        given = (packed(rows), packed(rows, "mul", expected), packed(rows, "add", expected))
        wanted = (expected, expected * expected, expected + expected)
        if not all(torch.allclose(one, other, atol=1e-3) for one, other in zip(given, wanted, strict=True)):
            return "oneDNN's result is not that of a linear layer"
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class Packed:
    """A weight [out, in] in oneDNN's layout, with its bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _FOR_ROWS)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, rows: torch.Tensor, then: str = "none", other: torch.Tensor | None = None) -> torch.Tensor:
        """The layer for two rows or more: then "swish", or "add" or "mul" with another tensor, in the same pass."""
        if other is None:
            return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, then, [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(rows, other, self._weight, self._bias, then)


class PackedLinear(torch.nn.Module):
    """Stands for a torch.nn.Linear, whose weight it shares; or for transformers' Conv1D, its transpose."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias
        self._packed = Packed(weight, bias)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if rows.numel() <= self.in_features:
            return linear(rows, self.weight, self.bias)
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
