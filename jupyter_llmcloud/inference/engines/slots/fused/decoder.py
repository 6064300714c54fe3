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
from torch.nn.functional import embedding

from jupyter_llmcloud.inference.engines.slots.attention import attend
from jupyter_llmcloud.inference.engines.slots.fused.layers import (
    DecoderLayers,
    LayerWeights,
    LinearWeight,
    NormWeight,
    Shape,
    compiled,
)
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

    Attributes:
        layers: compiled, where TorchScript can be had.
    """

    def __init__(self, model: Any, windows: list[int], context_length: int) -> None:
        network = model.model
        self._windows = windows
        self._rotation = _Rotation(network.rotary_emb, context_length)
        self._shape = _shape_of(network.layers[0].self_attn)
        self._embeddings = network.embed_tokens.weight.detach()
        self.layers = compiled(
            DecoderLayers(
                self._embeddings, [_layer_weights(layer, self._shape) for layer in network.layers],
                _norm_weight(network.norm), _linear_weight(model.lm_head.weight, model.lm_head.bias), self._shape,
            )
        )  # fmt: skip

    def run(self, step: Step) -> torch.Tensor:
        """The scores [n, vocabulary] of the tokens that `step.scored` names."""
        # What is compiled is not compiled anew for other shapes.
        with torch.jit.optimized_execution(False):
            return self._decode(step) if step.only_decodes else self._read(step)

    def _decode(self, step: Step) -> torch.Tensor:
        here, factors = step.groups[0], self._rotation.of(step)
        masks = [here.mask(window, factors.real.dtype) for window in self._windows]
        scores: torch.Tensor = self.layers(step.ids[0], factors, here.places, masks, here.group.layers)
        return scores

    def _read(self, step: Step) -> torch.Tensor:
        rows, factors = embedding(step.ids[0], self._embeddings), self._rotation.of(step)
        for index, window in enumerate(self._windows):
            attended = self._attended(index, self.layers.begin(index, rows, factors), window, step)
            if index + 1 == len(self._windows) and len(step.scored) < len(rows):
                # Of the others, nobody asks what comes after the last layer's keys and values.
                if not step.scored:
                    return rows[:0]
                scored = torch.tensor(step.scored)
                rows, attended = rows.index_select(0, scored), attended.index_select(0, scored)
            rows = self.layers.end(index, rows, attended)
        scores: torch.Tensor = self.layers.scores(rows)
        return scores

    def _attended(self, index: int, joined: torch.Tensor, window: int, step: Step) -> torch.Tensor:
        shape, num_tokens = self._shape, len(joined)
        queries = joined.view(num_tokens, -1, shape.size)[:, : shape.num_heads]
        kept = joined[:, shape.num_heads * shape.size :]
        return attend(step, index, queries, kept, window, shape.scaling).reshape(num_tokens, -1)


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


def _shape_of(attention: Any) -> Shape:
    size: int = attention.head_dim
    num_heads, num_keys = (part.weight.shape[0] // size for part in (attention.q_proj, attention.k_proj))
    return Shape(num_heads, num_heads + num_keys, size, attention.scaling)


def _layer_weights(layer: Any, shape: Shape) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        attention_norm=_norm_weight(layer.input_layernorm),
        joined=_queries_keys_values(attention),
        head_norm=_head_norm(attention, shape) if hasattr(attention, "q_norm") else None,
        output=_linear_weight(attention.o_proj.weight, attention.o_proj.bias),
        mlp_norm=_norm_weight(layer.post_attention_layernorm),
        gate_up=_joined([mlp.gate_proj, mlp.up_proj]),
        down=_linear_weight(mlp.down_proj.weight, mlp.down_proj.bias),
    )


def _norm_weight(norm: Any) -> NormWeight:
    size = norm.weight.shape[0]
    least = torch.tensor((size * norm.variance_epsilon) ** 0.5, dtype=norm.weight.dtype)
    return NormWeight(norm.weight.detach() * size**0.5, least)


def _head_norm(attention: Any, shape: Shape) -> NormWeight:
    """Qwen 3's normalisation of each query and each key."""
    size, norms = shape.size, (attention.q_norm, attention.k_norm)
    query, key = (_paired(norm.weight, size) * size**0.5 for norm in norms)
    num_keys = shape.num_rotated - shape.num_heads
    weight = torch.cat([query.expand(shape.num_heads, size), key.expand(num_keys, size)])
    least = [(size * norm.variance_epsilon) ** 0.5 for norm in norms]
    return NormWeight(weight, torch.tensor([least[0]] * shape.num_heads + [least[1]] * num_keys).view(-1, 1))


def _linear_weight(weight: torch.Tensor, bias: torch.Tensor | None) -> LinearWeight:
    packed = Packed(weight, bias)
    return LinearWeight(packed.weight, packed.by_inputs, packed.bias)


def _queries_keys_values(attention: Any) -> LinearWeight:
    size, parts = attention.head_dim, [attention.q_proj, attention.k_proj, attention.v_proj]
    weights = [part.weight.detach() for part in parts]
    biases = [part.bias for part in parts]
    weight = torch.cat([_paired(weights[0], size), _paired(weights[1], size), weights[2]])
    if biases[0] is None:
        return _linear_weight(weight, None)
    return _linear_weight(weight, torch.cat([_paired(biases[0], size), _paired(biases[1], size), biases[2]]))


def _paired(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of each head so that what is rotated together stands together."""
    heads = weight.detach().unflatten(0, (-1, 2, size // 2))
    return heads.transpose(1, 2).flatten(0, 2).contiguous()


def _joined(parts: list[Any]) -> LinearWeight:
    """Linear layers of one input as one."""
    biases = [part.bias for part in parts]
    weight = torch.cat([part.weight.detach() for part in parts])
    return _linear_weight(weight, None if biases[0] is None else torch.cat(biases))
