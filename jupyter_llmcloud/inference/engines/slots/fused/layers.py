"""The layers of a fused decoder, as functions of tensors that TorchScript can compile.

A step for sequences that each read one token is one call, inside of which no Python runs: the interpreter's lock is
free meanwhile, for whoever sends what the step before has given. Where TorchScript cannot compile it, the same code
runs as it stands.
"""

# No `from __future__ import annotations`: TorchScript reads the types of a NamedTuple's fields.
import logging
import warnings
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

log = logging.getLogger(__name__)


class NormWeight(NamedTuple):
    """Root mean square normalisation (Zhang and Sennrich 2019), by a vector's length instead of its mean square.

    Attributes:
        weight: times the root of the vector's size.
        least: what the length is at least: the root of size and epsilon.
    """

    weight: Tensor
    least: Tensor


class LinearWeight(NamedTuple):
    """A linear layer; see `packed_linear.Packed`.

    Attributes:
        packed: the weight in oneDNN's layout.
        by_inputs: [in, out], for a single row.
    """

    packed: Tensor
    by_inputs: Tensor
    bias: Optional[Tensor]  # noqa: UP045


class LayerWeights(NamedTuple):
    """A layer: attention, then the gated MLP, each added to what comes in.

    Attributes:
        joined: queries, keys and values; of the first two the rows that are rotated together stand side by side.
        head_norm: of each query and each key, where the model has one.
    """

    attention_norm: NormWeight
    joined: LinearWeight
    head_norm: Optional[NormWeight]  # noqa: UP045
    output: LinearWeight
    mlp_norm: NormWeight
    gate_up: LinearWeight
    down: LinearWeight


class Shape(NamedTuple):
    """What all layers share.

    Attributes:
        num_heads: that ask.
        num_rotated: these and the heads of keys.
        size: of a head.
        scaling: of attention's scores.
    """

    num_heads: int
    num_rotated: int
    size: int
    scaling: float


def normed(rows: Tensor, norm: NormWeight) -> Tensor:
    """[..., size] to the same shape."""
    lengths = torch.linalg.vector_norm(rows, 2.0, [-1], True)
    return rows.div(lengths.hypot_(norm.least)).mul_(norm.weight)


def linear(rows: Tensor, weight: LinearWeight) -> Tensor:
    """[n, in] to [n, out]."""
    if rows.size(0) > 1:
        return torch.ops.mkldnn._linear_pointwise(rows, weight.packed, weight.bias, "none", [], "")
    product = torch.mm(rows, weight.by_inputs)
    bias = weight.bias
    return product if bias is None else product.add_(bias)


def linear_added(residual: Tensor, rows: Tensor, weight: LinearWeight) -> Tensor:
    """The same, added to [n, out]."""
    if rows.size(0) > 1:
        return torch.ops.mkldnn._linear_pointwise(rows, residual, weight.packed, weight.bias, "add")
    added = torch.addmm(residual, rows, weight.by_inputs)
    bias = weight.bias
    return added if bias is None else added.add_(bias)


def before_attention(rows: Tensor, factors: Tensor, layer: LayerWeights, shape: Shape) -> Tensor:
    """Queries, keys and values, one after the other, of [tokens, hidden]; `factors` rotate the first two."""
    joined = linear(normed(rows, layer.attention_norm), layer.joined)
    rotated = joined.view(rows.size(0), -1, shape.size).narrow(1, 0, shape.num_rotated)
    norm = layer.head_norm
    if norm is not None:
        lengths = torch.linalg.vector_norm(rotated, 2.0, [-1], True)
        rotated.div_(lengths.hypot_(norm.least)).mul_(norm.weight)
    torch.view_as_complex(rotated.unflatten(2, [shape.size // 2, 2])).mul_(factors)
    return joined


def after_attention(rows: Tensor, attended: Tensor, layer: LayerWeights) -> Tensor:
    """The rest of the layer: [tokens, hidden] and what attention gave, to [tokens, hidden]."""
    rows = linear_added(rows, attended, layer.output)
    both = linear(normed(rows, layer.mlp_norm), layer.gate_up)
    num_gates = both.size(1) // 2
    gated = silu(both.narrow(1, 0, num_gates)).mul_(both.narrow(1, num_gates, num_gates))
    return linear_added(rows, gated, layer.down)


def attended_rows(joined: Tensor, kept: Tensor, places: Tensor, mask: Tensor, shape: Shape) -> Tensor:
    """Put the keys and values of one token per row into the slots, and let its queries see its row."""
    num_rows = joined.size(0)
    num_keys = shape.num_rotated - shape.num_heads
    begin, width = shape.num_heads * shape.size, 2 * num_keys * shape.size
    kept.view(-1, width).index_copy_(0, places, joined.narrow(1, begin, width))
    seen = kept.narrow(0, 0, num_rows).narrow(1, 0, mask.size(3)).transpose(1, 2)
    # The heads that share a key stand where the tokens of one query would: they all see the same positions.
    queries = joined.narrow(1, 0, begin).reshape(num_rows, num_keys, shape.num_heads // num_keys, shape.size)
    keys, values = seen.narrow(1, 0, num_keys), seen.narrow(1, num_keys, num_keys)
    attended = scaled_dot_product_attention(queries, keys, values, mask, 0.0, False, scale=shape.scaling)
    return attended.reshape(num_rows, begin)


class DecoderLayers(torch.nn.Module):
    """Embeddings, layers and head.

    Args:
        embeddings: [vocabulary, hidden].
        layers: in order.
        norm, head: what comes after them.
    """

    layers: list[LayerWeights]
    norm: NormWeight
    head: LinearWeight
    shape: Shape

    def __init__(
        self,
        embeddings: Tensor,
        layers: list[LayerWeights],
        norm: NormWeight,
        head: LinearWeight,
        shape: Shape,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.layers = layers
        self.norm = norm
        self.head = head
        self.shape = shape

    def forward(
        self,
        ids: Tensor,
        factors: Tensor,
        places: Tensor,
        masks: list[Tensor],
        kept: list[Tensor],
    ) -> Tensor:
        """The scores of one token per row of a group of slots.

        Args:
            ids, places: of each row's token: [rows].
            factors: [rows, 1, half a head].
            masks: what each layer sees: [rows, 1, 1, positions].
            kept: keys and values of each layer: [slots, capacity, 2 * key heads, size].
        """
        rows = torch.embedding(self.embeddings, ids)
        for index in range(len(kept)):
            layer = self.layers[index]
            joined = before_attention(rows, factors, layer, self.shape)
            attended = attended_rows(joined, kept[index], places, masks[index], self.shape)
            rows = after_attention(rows, attended, layer)
        return linear(normed(rows, self.norm), self.head)

    @torch.jit.export
    def begin(self, index: int, rows: Tensor, factors: Tensor) -> Tensor:
        """Queries, keys and values of a layer."""
        return before_attention(rows, factors, self.layers[index], self.shape)

    @torch.jit.export
    def end(self, index: int, rows: Tensor, attended: Tensor) -> Tensor:
        """What comes after a layer's attention."""
        return after_attention(rows, attended, self.layers[index])

    @torch.jit.export
    def scores(self, rows: Tensor) -> Tensor:
        """What the head makes of the last layer's rows."""
        return linear(normed(rows, self.norm), self.head)


def compiled(layers: DecoderLayers) -> Any:
    """The same by TorchScript; as it stands, where that cannot be had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated; what comes after it needs a compiler
            return torch.jit.script(layers)
    except Exception as error:
        log.info("the decoder is not compiled: %s: %s", type(error).__name__, error)
        return layers
