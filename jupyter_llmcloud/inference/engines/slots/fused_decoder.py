"""A decoder of the Llama family in as few operations as it needs: at few sequences, calling them is what costs.

transformers calls some sixty operations a layer, below three levels of wrappers. Here a layer is some twenty calls in
one loop: queries, keys and values are one matrix product, and so are the two branches of the MLP; a rotation is one
complex product (the two numbers of a rotated pair stand side by side, for which rows of the weights are reordered) with
a factor that is looked up in a table; residuals are added by the products before them. The numbers are the same but for
rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding, silu

from jupyter_llmcloud.inference.engines.slots.attention import attend
from jupyter_llmcloud.inference.engines.slots.packed_linear import Packed
from jupyter_llmcloud.inference.engines.slots.step import Step

_FAMILY = ("Llama", "Mistral", "Qwen2", "Qwen3")
_POSITIONS_AT_FIRST = 512


def can_be_fused(model: torch.nn.Module) -> bool:
    """Whether it is a language model of a kind that is known, with the activation that is, and nothing was put into it.

    An adapter stands in the place of a linear layer, and hooks stand before or after one.
    """
    family = next((name for name in _FAMILY if _is(model, name, "ForCausalLM")), "")
    network: Any = getattr(model, "model", None)
    if not family or not _is(network, family, "Model"):
        return False
    known = {f"{family}{part}" for part in ("DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding", "Model")}
    known |= {f"{family}ForCausalLM", "Linear", "Embedding", "ModuleList", "SiLU", "SiLUActivation"}
    for module in model.modules():
        kind = type(module)
        if kind.__name__ not in known or not kind.__module__.startswith(("torch.nn.", "transformers.")):
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    return getattr(network.config, "hidden_act", None) in ("silu", "swish")


def _is(module: Any, family: str, part: str) -> bool:
    kind = type(module)
    wanted = f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}{part}"
    return f"{kind.__module__}.{kind.__qualname__}" == wanted


class FusedDecoder:
    """Embeddings, layers and the language-model head of a model that `can_be_fused`. It shares or copies its weights.

    Args:
        model: the language model.
        windows: how many positions each layer's tokens see; 0: all.
        context_length: how many positions there are.
    """

    def __init__(self, model: Any, windows: list[int], context_length: int) -> None:
        network = model.model
        self._embeddings = network.embed_tokens.weight.detach()
        self._rotation = _Rotation(network.rotary_emb, context_length)
        layers = zip(network.layers, windows, strict=True)
        self._layers = [
            (_Attention(layer, index, window), _GatedMLP(layer)) for index, (layer, window) in enumerate(layers)
        ]
        self._norm = _Norm(network.norm)
        self._head = Packed(model.lm_head.weight, model.lm_head.bias)

    def run(self, step: Step) -> torch.Tensor:
        """The scores [n, vocabulary] of the tokens that `step.scored` names."""
        rows = embedding(step.ids[0], self._embeddings)
        factors = self._rotation.of(step)
        for attention, mlp in self._layers:
            rows = mlp(attention(rows, factors, step))
        if len(step.scored) < len(rows):
            rows = rows.index_select(0, step.scored)
        return self._head(self._norm(rows))


class _Norm:
    """Root mean square normalisation (Zhang and Sennrich 2019), by a vector's length instead of its mean square."""

    def __init__(self, norm: Any) -> None:
        size = norm.weight.shape[0]
        self._weight = norm.weight.detach() * size**0.5
        self._least = torch.tensor((size * norm.variance_epsilon) ** 0.5, dtype=norm.weight.dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return rows.div(lengths.hypot_(self._least)).mul_(self._weight)


class _Rotation:
    """The rotations of positions as complex numbers, which the model's own module has given."""

    def __init__(self, module: Any, context_length: int) -> None:
        self._module = module
        self._context_length = context_length
        self._table = torch.empty(0)

    def of(self, step: Step) -> torch.Tensor:
        """[tokens, 1, half a head]."""
        if step.num_positions > len(self._table):
            # No further than the context: some modules change all positions when they see one beyond it.
            wanted = min(max(_POSITIONS_AT_FIRST, 2 * step.num_positions), self._context_length)
            self._extend(max(wanted, step.num_positions))
        return self._table.index_select(0, step.positions[0]).unsqueeze(1)

    def _extend(self, num_positions: int) -> None:
        positions = torch.arange(num_positions).unsqueeze(0)
        cosine, sine = self._module(torch.empty(0), positions)
        half = cosine.shape[-1] // 2
        self._table = torch.complex(cosine[0, :, :half], sine[0, :, :half])


class _Attention:
    """The first half of a layer: attention over slots, added to what comes in."""

    def __init__(self, layer: Any, index: int, window: int) -> None:
        attention = layer.self_attn
        self._index, self._window, self._scaling = index, window, attention.scaling
        self._size: int = attention.head_dim
        self._num_heads = attention.q_proj.weight.shape[0] // self._size
        self._num_rotated = self._num_heads + attention.k_proj.weight.shape[0] // self._size
        self._norm = _Norm(layer.input_layernorm)
        self._joined = self._queries_keys_values(attention)
        self._output = Packed(attention.o_proj.weight, attention.o_proj.bias)
        self._head_norm: _HeadNorm | None = None
        if hasattr(attention, "q_norm"):
            self._head_norm = _HeadNorm(attention, self._num_heads, self._num_rotated)

    def _queries_keys_values(self, attention: Any) -> Packed:
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights = [part.weight.detach() for part in parts]
        biases = [part.bias for part in parts]
        weight = torch.cat([_paired(weights[0], self._size), _paired(weights[1], self._size), weights[2]])
        if biases[0] is None:
            return Packed(weight, None)
        return Packed(weight, torch.cat([_paired(biases[0], self._size), _paired(biases[1], self._size), biases[2]]))

    def __call__(self, rows: torch.Tensor, factors: torch.Tensor, step: Step) -> torch.Tensor:
        """[tokens, hidden] to the same shape."""
        num_tokens = rows.shape[0]
        joined = self._joined(self._norm(rows))
        heads = joined.view(num_tokens, -1, self._size)
        if self._head_norm is not None:
            self._head_norm.apply_to(heads)
        heads.view(torch.complex64)[:, : self._num_rotated].mul_(factors)
        kept = joined[:, self._num_heads * self._size :]
        attended = attend(step, self._index, heads[:, : self._num_heads], kept, self._window, self._scaling)
        return self._output.add_to(rows, attended.view(num_tokens, -1))


class _GatedMLP:
    """The second half of a layer, added to what comes in."""

    def __init__(self, layer: Any) -> None:
        mlp = layer.mlp
        self._norm = _Norm(layer.post_attention_layernorm)
        self._gate_up = _joined([mlp.gate_proj, mlp.up_proj])
        self._down = Packed(mlp.down_proj.weight, mlp.down_proj.bias)
        self._num_gates = mlp.gate_proj.weight.shape[0]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] to the same shape."""
        both = self._gate_up(self._norm(rows))
        gated = silu(both[:, : self._num_gates]).mul_(both[:, self._num_gates :])
        return self._down.add_to(rows, gated)


class _HeadNorm:
    """Qwen 3's normalisation of each query and each key."""

    def __init__(self, attention: Any, num_heads: int, num_rotated: int) -> None:
        size, norms = attention.head_dim, (attention.q_norm, attention.k_norm)
        query, key = (_paired(norm.weight, size) * size**0.5 for norm in norms)
        num_key_heads = num_rotated - num_heads
        self._weight = torch.cat([query.expand(num_heads, size), key.expand(num_key_heads, size)])
        least = [(size * norm.variance_epsilon) ** 0.5 for norm in norms]
        self._least = torch.tensor([least[0]] * num_heads + [least[1]] * num_key_heads).view(-1, 1)

    def apply_to(self, heads: torch.Tensor) -> None:
        """[tokens, heads, size], in place; values come after what is rotated."""
        rotated = heads[:, : len(self._weight)]
        rotated.div_(torch.linalg.vector_norm(rotated, dim=-1, keepdim=True).hypot_(self._least)).mul_(self._weight)


def _paired(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of each head so that what is rotated together stands together."""
    heads = weight.detach().unflatten(0, (-1, 2, size // 2))
    return heads.transpose(1, 2).flatten(0, 2).contiguous()


def _joined(parts: list[Any]) -> Packed:
    """Linear layers of one input as one."""
    biases = [part.bias for part in parts]
    return Packed(torch.cat([part.weight.detach() for part in parts]), None if biases[0] is None else torch.cat(biases))
