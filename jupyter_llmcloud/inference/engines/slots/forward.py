"""The model as the slot engine runs it: the same weights, in a copy of its modules whose attention reads slots."""

from __future__ import annotations

import copy
import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch

from jupyter_llmcloud.inference.engines.kv_cache import free_memory
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.slots.attention import NAME, LayerSeen, SlotCache, Unsuitable
from jupyter_llmcloud.inference.engines.slots.fused.decoder import FusedDecoder, can_be_fused
from jupyter_llmcloud.inference.engines.slots.kv_slots import SlotGroup
from jupyter_llmcloud.inference.engines.slots.packed_linear import pack_linears, why_not_packed
from jupyter_llmcloud.inference.engines.slots.step import Part, Step, make_step

log = logging.getLogger(__name__)

_NUM_TRIED = 9
_ROUNDING = 1e-4
_PACKED_TIMES_FREE = 2.5
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class ForwardPass:
    """Runs steps. The model that was loaded stays as it is: others go on using it.

    Attributes:
        model: the copy.
        decoder: what runs in its place, if it is of a kind that is known.
        layers: what each layer's attention is like.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        config = loaded.model.config.get_text_config()
        _check_kinds(config, loaded.context_length)
        self.model = _copy_that_shares_weights(loaded.model)
        self.model.set_attn_implementation(NAME)
        self._cache = SlotCache(config.num_hidden_layers)
        parameters = inspect.signature(type(self.model).forward).parameters
        # transformers calls it `cache` from 5.24 on, where the architecture has followed.
        self._cache_given = {"cache" if "cache" in parameters else "past_key_values": self._cache, "use_cache": True}
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        self.decoder: FusedDecoder | None = None
        self.layers = self._first_pass(config, loaded)
        self._quicken(loaded)

    @torch.inference_mode()
    def _quicken(self, loaded: LoadedModel) -> None:
        """Pack weights; and use a decoder of ours where the model is one that is known, and it computes the same."""
        model = loaded.model
        weights = sum(weight.numel() * weight.itemsize for weight in model.parameters())
        reason = why_not_packed(model.dtype, model.device)
        if reason is None and (free := free_memory(model.device)) < _PACKED_TIMES_FREE * weights:
            reason = (
                f"the packed copy of {weights / 2**20:.0f} MiB of weights needs more than the {free / 2**20:.0f} free"
            )
        if reason is not None:
            log.info("weights are not packed: %s", reason)
            return
        if can_be_fused(model):
            expected = self._tried_scores()
            self.decoder = FusedDecoder(model, [layer.window for layer in self.layers], loaded.context_length)
            error = float((self._tried_scores() - expected).abs().max())
            if error <= _ROUNDING * max(1.0, float(expected.abs().max())):
                return
            log.warning("the decoder of ours is not used: its scores are off by %.3g", error)
            self.decoder = None
        pack_linears(self.model)

    def _tried_scores(self) -> torch.Tensor:
        """Of a few tokens that are read together, and of two that follow one by one: [tokens, vocabulary]."""
        group = SlotGroup([layer.shape for layer in self.layers], _NUM_TRIED, self.model.dtype, self.model.device)
        group.resize(1)
        tried = _Tried()
        group.add(tried)
        num_vocabulary = self.model.config.get_text_config().vocab_size
        tokens = [(7 * position + 3) % num_vocabulary for position in range(_NUM_TRIED)]
        scores = []
        for begin, end in ((0, _NUM_TRIED - 2), (_NUM_TRIED - 2, _NUM_TRIED - 1), (_NUM_TRIED - 1, _NUM_TRIED)):
            part = Part(tried, tokens[begin:end], num_scored=end - begin)  # type: ignore[arg-type]
            scores.append(self.run(make_step([part], self.model.device)))
            tried.num_cached = end
        return torch.cat(scores)

    @torch.inference_mode()
    def _first_pass(self, config: Any, loaded: LoadedModel) -> list[LayerSeen]:
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.model.device)
        positions = torch.arange(2, device=self.model.device).unsqueeze(0)
        self.model(input_ids=ids, position_ids=positions, **self._cache_given)
        layers = self._cache.seen
        if len(layers) != config.num_hidden_layers:
            raise Unsuitable(f"{len(layers)} of its {config.num_hidden_layers} layers have an attention that is known")
        for layer, wanted in zip(layers, _windows(config), strict=True):
            if wanted and wanted < loaded.context_length and layer.window != wanted:
                raise Unsuitable(f"a layer should see {wanted} positions and does not say so")
        return layers

    @torch.inference_mode()
    def run(self, step: Step) -> torch.Tensor:
        """The scores [n, vocabulary] of the tokens that `step.scored` names; void, when it names none."""
        if self.decoder is not None:
            return self.decoder.run(step)
        scored = torch.tensor(step.scored or [0], device=step.ids.device)
        self._cache.step = step
        given: dict[str, Any] = {"logits_to_keep": scored} if self._takes_logits_to_keep else {}
        output = self.model(input_ids=step.ids, position_ids=step.positions, **self._cache_given, **given)
        logits: torch.Tensor = output.logits[0]
        return (logits if self._takes_logits_to_keep else logits[scored]).float()


@dataclass
class _Tried:
    """Stands for a sequence."""

    group: SlotGroup | None = None
    row: int = -1
    num_cached: int = 0


def _copy_that_shares_weights(model: Any) -> Any:
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _check_kinds(config: Any, context_length: int) -> None:
    """Raise Unsuitable for layers whose tokens see something else than what comes before them, or a window of it."""
    if unknown := set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS:
        raise Unsuitable(f"it has layers of kind {sorted(unknown)[0]}")
    chunk = getattr(config, "attention_chunk_size", None)
    if isinstance(chunk, int) and chunk < context_length:
        raise Unsuitable(f"its attention is cut into chunks of {chunk} tokens")


def _windows(config: Any) -> list[int]:
    """How many positions each layer should see, by the configuration; 0: all."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return [0] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]
