"""Embeddings: the hidden states of a model's last layer, pooled into one vector of length 1 for each text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.inference.engines.loading import LoadedModel

POOLINGS = ("mean", "cls", "last")


def pooling_of(folder: str) -> str:
    """The pooling that a folder of sentence-transformers states; mean, which is its default, for any other."""
    path = Path(folder) / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    config = json.loads(path.read_bytes())
    if config.get("pooling_mode_cls_token"):
        return "cls"
    return "last" if config.get("pooling_mode_lasttoken") else "mean"


class Embedder:
    """Embeds with the weights that are served, in a thread of its own: one forward pass per text, without a cache."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._pooling = pooling_of(str(getattr(loaded.model, "name_or_path", "") or ""))
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
        network = model.get_encoder() if self._loaded.is_encoder_decoder else getattr(model, "base_model", model)
        tokens = torch.tensor([prompt], device=model.device)
        states = network(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0].float()
        pooled = {"cls": states[0], "last": states[-1]}.get(self._pooling, states.mean(dim=0))
        return torch.nn.functional.normalize(pooled, dim=-1)
