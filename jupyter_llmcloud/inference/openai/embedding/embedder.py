"""Embeddings: the hidden states of a model's last layer, pooled into one vector of length 1 for each text."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.openai.embedding.pooling import pooling_of


class Embedder:
    """Embeds with the weights that are served, in a thread of its own: one forward pass per text, without a cache."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._pooling = pooling_of(Path(str(getattr(loaded.model, "name_or_path", "") or "")))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedding")

    def submit(self, prompts: Sequence[Sequence[int]]) -> Any:
        """A future of one vector per prompt, float32 [hidden size], L2-normalised."""
        return self._thread.submit(self._embed, [list(prompt) for prompt in prompts])

    def close(self) -> None:
        """No more of it."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def _embed(self, prompts: list[list[int]]) -> list[Any]:
        return [self._vector(prompt).cpu().numpy() for prompt in prompts]

    def _vector(self, prompt: list[int]) -> torch.Tensor:
        model = self._loaded.model
        both = getattr(model.config, "is_encoder_decoder", False)
        network = model.get_encoder() if both else getattr(model, "base_model", model)
        tokens = torch.tensor([prompt], device=model.device)
        states = network(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0].float()
        pooled = {"cls": states[0], "last": states[-1]}.get(self._pooling, states.mean(dim=0))
        return torch.nn.functional.normalize(pooled, dim=-1)
