"""Attention over slots, behind transformers' attention interface, and the cache that the model is given for it.

The tokens of a step stand side by side in one row, as if they were one sequence. The model hands keys and values to
the cache, which puts them into the slots, and then calls the attention function of its configuration: ours, which lets
each token see its own sequence. transformers makes no mask for a function it knows no mask for.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from jupyter_llmcloud.inference.engines.slots.kv_slots import LayerShape
from jupyter_llmcloud.inference.engines.slots.step import Bundle, GroupStep, Step

NAME = "jupyter_llmcloud_slots"

# What models pass to their attention that is of no concern to it.
_IGNORED = frozenset((
    "dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states",
    "return_dict", "layer_idx", "deterministic", "logits_to_keep", "position_embeddings", "training",
))  # fmt: skip


class Unsuitable(Exception):
    """The attention of this model does something that slots do not know."""


@dataclass(slots=True)
class LayerSeen:
    """What a layer's attention has asked for in the first pass.

    Attributes:
        shape: of its keys.
        window: how many positions a token sees, its own included; 0: all.
    """

    shape: LayerShape
    window: int


class SlotCache(Cache):
    """Takes the keys and values of a step. While `step` is None it notes what the layers are like.

    Attributes:
        step: what goes through the model now.
        seen: the layers of the first pass.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_SlotLayer() for _ in range(num_layers)])
        self.step: Step | None = None
        self.seen: list[LayerSeen] = []
        self.layer = -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values [1, heads, tokens, size] where they belong."""
        self.layer = layer_idx
        _current.cache = self
        if self.step is not None:
            for here in self.step.groups:
                _write(here, layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given, so nothing is counted."""
        return 0


class _SlotLayer(CacheLayerMixin):
    """Stands for a layer; the cache itself does the work."""

    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is kept here."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Not called: SlotCache.update comes before it."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is made."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Positions are given."""
        return 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1


_current = threading.local()


def _write(here: GroupStep, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    kept = here.group.layers[layer].flatten(0, 1)
    num_key_heads = kept.shape[1] // 2
    for states, half in ((keys, kept[:, :num_key_heads]), (values, kept[:, num_key_heads:])):
        half.index_copy_(0, here.places, states[0, :, here.start : here.end].transpose(0, 1))


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for every token of the step over its own sequence; see transformers' AttentionInterface.

    Args:
        module: the attention of a layer.
        query: [1, heads, tokens, head size].
        key, value: [1, key heads, tokens, head size], as `SlotCache.update` gave them back.
        attention_mask: None.
        scaling: of the scores; by default 1 / sqrt(head size).
        sliding_window: how many positions a token sees, its own included.
        softcap: Gemma 2's bound of the scores.
        s_aux: GPT-OSS's sinks.
    """
    cache: SlotCache | None = getattr(_current, "cache", None)
    if cache is None:
        raise Unsuitable("a layer reads keys and values that it does not keep itself")
    layer, cache.layer = cache.layer, -1
    if layer < 0:
        raise Unsuitable("a layer reads keys and values that it does not keep itself")
    window = sliding_window or 0
    extras = _Extras(scaling, softcap, s_aux)
    if cache.step is None:
        _check(module, query, key, value, attention_mask, others)
        cache.seen.append(LayerSeen(LayerShape(key.shape[1], key.shape[3]), window))
        return _first_pass(query, key, value, window, extras).transpose(1, 2), None
    return _over_slots(cache.step, layer, query[0].transpose(0, 1), window, extras).unsqueeze(0), None


AttentionInterface.register(NAME, slot_attention)


@dataclass(slots=True)
class _Extras:
    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None


def attend(
    step: Step, layer: int, queries: torch.Tensor, kept: torch.Tensor, window: int, scaling: float | None
) -> torch.Tensor:
    """The same for layers of ours: put keys and values into the slots, and let the queries see them.

    Args:
        step: what goes through the layer.
        layer: its index.
        queries: [tokens, heads, head size].
        kept: keys, then values: [tokens, 2 * key heads * head size].
        window: how many positions a token sees, its own included; 0: all.
        scaling: of the scores.
    """
    for here in step.groups:
        target = here.group.layers[layer]
        states = kept if len(step.groups) == 1 else kept[here.start : here.end]
        target.view(-1, kept.shape[1]).index_copy_(0, here.places, states)
    return _over_slots(step, layer, queries, window, _Extras(scaling, None, None))


def _over_slots(step: Step, layer: int, queries: torch.Tensor, window: int, extras: _Extras) -> torch.Tensor:
    """Queries [tokens, heads, size] of a whole step to the same shape."""
    groups = step.groups
    if len(groups) == 1 and not groups[0].longer:
        return _decoded(groups[0], layer, queries, window, extras)
    output = queries.new_empty(queries.shape)
    for here in groups:
        end = here.start + here.num_decoding
        if here.num_decoding:
            output[here.start : end] = _decoded(here, layer, queries[here.start : end], window, extras)
        for bundle in here.bundles:
            output[bundle.tokens] = _of_bundle(here, bundle, layer, queries, window, extras)
    return output


def _decoded(here: GroupStep, layer: int, queries: torch.Tensor, window: int, extras: _Extras) -> torch.Tensor:
    num_rows, num_heads, size = queries.shape
    keys, values = here.group.seen(num_rows, here.longest)[layer]
    num_key_heads = keys.shape[1]
    # The heads that share a key stand where the tokens of one query would: they all see the same positions.
    grouped = queries.reshape(num_rows, num_key_heads, num_heads // num_key_heads, size)
    mask = here.mask(window, queries.dtype)
    return _attend(grouped, keys, values, mask, extras).reshape(num_rows, num_heads, size)


def _of_bundle(
    here: GroupStep, bundle: Bundle, layer: int, queries: torch.Tensor, window: int, extras: _Extras
) -> torch.Tensor:
    """Attention of the tokens of some sequences, out of the queries of a whole step: [tokens, heads, size]."""
    num_rows, longest, num_heads, size = len(bundle.parts), bundle.longest, *queries.shape[1:]
    chosen = queries[bundle.tokens] if bundle.padded is None else queries.index_select(0, bundle.padded)
    kept = here.group.layers[layer][bundle.row : bundle.row + num_rows, : bundle.length].transpose(1, 2)
    num_key_heads = kept.shape[1] // 2
    keys, values = kept[:, :num_key_heads], kept[:, num_key_heads:]
    num_shared = num_heads // num_key_heads
    mask = here.bundle_mask(bundle, window, num_shared, queries.dtype)
    by_row = chosen.reshape(num_rows, longest, num_heads, size).transpose(1, 2)
    grouped = by_row.reshape(num_rows, num_key_heads, num_shared * longest, size)
    output = _attend(grouped, keys, values, mask, extras).reshape(num_rows, num_heads, longest, size)
    tokens = output.transpose(1, 2).reshape(num_rows * longest, num_heads, size)
    return tokens if bundle.kept is None else tokens.index_select(0, bundle.kept)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, extras: _Extras
) -> torch.Tensor:
    if extras.softcap is None and extras.sinks is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=extras.scaling)
    scale = query.shape[-1] ** -0.5 if extras.scaling is None else extras.scaling
    scores = (query @ keys.transpose(2, 3)).float() * scale
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    scores = scores + mask
    if extras.sinks is None:
        return scores.softmax(dim=-1).to(query.dtype) @ values
    num_shared = extras.sinks.shape[0] // keys.shape[1]
    num_tokens = query.shape[2] // num_shared
    sinks = extras.sinks.float().view(1, keys.shape[1], num_shared, 1).expand(query.shape[0], -1, -1, num_tokens)
    with_sinks = torch.cat([scores, sinks.reshape(*query.shape[:3], 1)], dim=-1)
    return with_sinks.softmax(dim=-1)[..., :-1].to(query.dtype) @ values


def _first_pass(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, extras: _Extras
) -> torch.Tensor:
    length, num_shared = query.shape[2], query.shape[1] // key.shape[1]
    places = torch.arange(length, device=query.device)
    hidden = places > places.unsqueeze(1)
    if window:
        hidden |= places <= places.unsqueeze(1) - window
    mask = torch.zeros(length, length, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
    grouped = query.reshape(1, key.shape[1], num_shared * length, query.shape[3])
    return _attend(grouped, key, value, mask.repeat(num_shared, 1), extras).reshape(query.shape)


def _check(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    others: dict[str, Any],
) -> None:
    """Raise Unsuitable for what would be ignored or is of another shape."""
    if attention_mask is not None:
        raise Unsuitable("its attention has a mask of its own")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
        raise Unsuitable(f"its keys {tuple(key.shape)} and values {tuple(value.shape)} have different shapes")
    if getattr(module, "is_causal", True) is False or others.get("is_causal") is False:
        raise Unsuitable("its attention is not causal")
    for name, given in others.items():
        if given is not None and given is not False and name not in _IGNORED:
            raise Unsuitable(f"its attention takes {name!r}")
