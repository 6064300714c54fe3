"""Decoder layers of the Llama family in as few operations as they need: at one sequence, calling them is what costs.

A layer of transformers calls about fifty operations. Here queries, keys and values are one matrix product, positions
are one complex product (the two numbers of a rotated pair stand side by side, for which rows of the weights are
reordered), and activations and residuals are part of the products before them. The numbers are the same but for
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, silu

from jupyter_llmcloud.inference.engines.slots.attention import SlotCache, attend
from jupyter_llmcloud.inference.engines.slots.packed_linear import Packed

_KNOWN = {
    f"transformers.models.{kind.lower()}.modeling_{kind.lower()}.{kind}DecoderLayer"
    for kind in ("Llama", "Mistral", "Qwen2", "Qwen3")
}


def can_be_fused(layer: torch.nn.Module) -> bool:
    """Whether it is a layer of a kind that is known, with the activation that is, and nothing was put into it.

    An adapter stands in the place of a linear layer, and hooks stand before or after one.
    """
    kind = type(layer)
    if f"{kind.__module__}.{kind.__qualname__}" not in _KNOWN:
        return False
    parts = [*layer.self_attn.children(), *layer.mlp.children()]  # type: ignore[union-attr]
    named = {type(part).__name__.removeprefix(kind.__name__.removesuffix("DecoderLayer")) for part in parts}
    if named - {"Linear", "RMSNorm", "SiLU", "SiLUActivation"} or not all(
        type(part) is torch.nn.Linear
        for part in parts
        if type(part).__name__ == "Linear" or isinstance(part, torch.nn.Linear)
    ):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules()):
        return False
    attention: Any = layer.self_attn
    return isinstance(layer.mlp.act_fn, torch.nn.SiLU) or (  # type: ignore[union-attr]
        getattr(attention.config, "hidden_act", None) == "silu"
    )


def fuse_layers(model: torch.nn.Module, windows: list[int]) -> bool:
    """Replace the layers of a model when all are of a known kind; whether they are."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or not all(can_be_fused(layer) for layer in layers):
        return False
    rotation = Rotation()
    for index, (layer, window) in enumerate(zip(list(layers), windows, strict=True)):
        layers[index] = FusedLayer(layer, index, window, rotation)
    return True


class Rotation:
    """The rotations of a step's positions as complex numbers, made once for all layers."""

    def __init__(self) -> None:
        self._made_of: torch.Tensor | None = None
        self._complex = torch.empty(0)

    def of(self, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """[tokens, 1, half a head] of [1, tokens, head]."""
        if self._made_of is not cosine:
            half = cosine.shape[-1] // 2
            self._complex = torch.complex(cosine[0, :, :half], sine[0, :, :half]).unsqueeze(1)
            self._made_of = cosine
        return self._complex


class FusedLayer(torch.nn.Module):
    """One decoder layer: attention over slots and a gated MLP."""

    def __init__(self, layer: Any, index: int, window: int, rotation: Rotation) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._attention = _Attention(attention, index, window, rotation)
        self._norms = [
            (norm.weight, norm.variance_epsilon) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._gate, self._up = _Linear(mlp.gate_proj), _Linear(mlp.up_proj)
        self._output, self._down = _Linear(attention.o_proj), _Linear(mlp.down_proj)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: SlotCache,
        **_: Any,
    ) -> torch.Tensor:
        """[1, tokens, hidden] to the same shape."""
        (before, before_eps), (after, after_eps) = self._norms
        rows = hidden_states[0]
        size = rows.shape[1:]
        attended = self._attention(rms_norm(rows, size, before, before_eps), position_embeddings, past_key_values)
        rows = self._output.add_to(rows, attended)
        normed = rms_norm(rows, size, after, after_eps)
        if len(rows) == 1:
            gated = silu(self._gate.plain(normed), inplace=True).mul_(self._up.plain(normed))
        else:
            gated = self._up.packed(normed, "mul", self._gate.packed(normed, "swish"))
        return self._down.add_to(rows, gated).unsqueeze(0)


class _Linear:
    """A linear layer, as it is for one row and packed for more."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self.weight, self.bias = layer.weight.detach(), layer.bias
        self.packed = Packed(self.weight, self.bias)

    def plain(self, rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, self.weight, self.bias)

    def add_to(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > 1:
            return self.packed(rows, "add", residual)
        if self.bias is None:
            return torch.addmm(residual, rows, self.weight.t())
        return linear(rows, self.weight, self.bias).add_(residual)


class _Attention:
    """Queries, keys and values by one product, rotated, kept, attended."""

    def __init__(self, layer: Any, index: int, window: int, rotation: Rotation) -> None:
        self._index, self._window, self._scaling = index, window, layer.scaling
        self._rotation = rotation
        self._size: int = layer.head_dim
        self._num_key_heads = layer.k_proj.weight.shape[0] // self._size
        self._num_heads = layer.q_proj.weight.shape[0] // self._size
        self._weight = torch.cat(
            [self._paired(layer.q_proj.weight), self._paired(layer.k_proj.weight), layer.v_proj.weight.detach()]
        )
        biases = [layer.q_proj.bias, layer.k_proj.bias, layer.v_proj.bias]
        self._bias: torch.Tensor | None = None
        if biases[0] is not None:
            self._bias = torch.cat([self._paired(biases[0]), self._paired(biases[1]), biases[2].detach()])
        self._packed = Packed(self._weight, self._bias)
        self._norms: list[Callable[[torch.Tensor], torch.Tensor]] = []
        if hasattr(layer, "q_norm"):
            self._norms = [self._norm(layer.q_norm), self._norm(layer.k_norm)]

    def _paired(self, weight: torch.Tensor) -> torch.Tensor:
        """Rows of each head so that what is rotated together stands together."""
        heads = weight.detach().unflatten(0, (-1, 2, self._size // 2))
        return heads.transpose(1, 2).flatten(0, 2).contiguous()

    def _norm(self, norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, epsilon = self._paired(norm.weight), norm.variance_epsilon
        return lambda heads: rms_norm(heads, heads.shape[-1:], weight, epsilon)

    def __call__(
        self, rows: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], cache: SlotCache
    ) -> torch.Tensor:
        num_tokens = len(rows)
        joined = linear(rows, self._weight, self._bias) if num_tokens == 1 else self._packed(rows)
        heads = joined.view(num_tokens, -1, self._size)
        num_rotated = self._num_heads + self._num_key_heads
        if self._norms:
            heads[:, : self._num_heads] = self._norms[0](heads[:, : self._num_heads])
            heads[:, self._num_heads : num_rotated] = self._norms[1](heads[:, self._num_heads : num_rotated])
        pairs = torch.view_as_complex(heads[:, :num_rotated].unflatten(2, (-1, 2)))
        pairs.mul_(self._rotation.of(*position_embeddings))
        kept = heads[:, self._num_heads :]
        attended = attend(cache, self._index, heads[:, : self._num_heads], kept, self._window, self._scaling)
        return attended.reshape(num_tokens, -1)
