"""The model as the slot engine runs it: the same weights, in a copy of its modules whose attention reads slots."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.slots.attention import NAME, LayerSeen, SlotCache, Unsuitable
from jupyter_llmcloud.inference.engines.slots.step import Step

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class ForwardPass:
    """Runs steps. The model that was loaded stays as it is: others go on using it.

    Attributes:
        model: the copy.
        layers: what each layer's attention is like.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        config = loaded.model.config.get_text_config()
        _check_kinds(config, loaded.context_length)
        self.model = _copy_that_shares_weights(loaded.model)
        self.model.set_attn_implementation(NAME)
        self._cache = SlotCache(config.num_hidden_layers)
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(type(self.model).forward).parameters
        self.layers = self._first_pass(config, loaded)

    @torch.inference_mode()
    def _first_pass(self, config: Any, loaded: LoadedModel) -> list[LayerSeen]:
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.model.device)
        positions = torch.arange(2, device=self.model.device).unsqueeze(0)
        self.model(input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True)
        layers = self._cache.seen
        if len(layers) != config.num_hidden_layers:
            raise Unsuitable(f"{len(layers)} of its {config.num_hidden_layers} layers have an attention that is known")
        for layer, wanted in zip(layers, _windows(config), strict=True):
            if wanted and wanted < loaded.context_length and layer.window != wanted:
                raise Unsuitable(f"a layer should see {wanted} positions and does not say so")
        return layers

    @torch.inference_mode()
    def run(self, step: Step) -> torch.Tensor:
        """The scores [n, vocabulary] of the tokens that `step.scored` names; of one token, when it names none."""
        scored = step.scored if len(step.scored) else step.scored.new_zeros(1)
        self._cache.step = step
        given: dict[str, Any] = {"logits_to_keep": scored} if self._takes_logits_to_keep else {}
        output = self.model(
            input_ids=step.ids, position_ids=step.positions, past_key_values=self._cache, use_cache=True, **given
        )
        logits: torch.Tensor = output.logits[0]
        return (logits if self._takes_logits_to_keep else logits[scored]).float()


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
