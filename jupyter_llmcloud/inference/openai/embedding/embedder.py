"""Embeddings: the hidden states of a model's last layer, pooled into one vector of length 1 for each text."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.open_inference.batching import Batcher, QueueFull
from jupyter_llmcloud.inference.openai.embedding.pooling import pooling_of
from jupyter_llmcloud.protocol.openai.embeddings import MAX_INPUTS

log = logging.getLogger(__name__)

_MAX_TEXTS = 64
_MAX_TOKENS = 4096
_TRIED = (3, 11, 7)
_ROUNDING = 1e-3
_RETRY_AFTER_S = 1.0


class Embedder:
    """Embeds with the weights that are served, in a thread of its own.

    Texts of all requests that wait make the next batch. Those of a batch that are about as long go through the model in
    one pass; each in one of its own, where the model turns out to give a text other vectors in company.

    Attributes:
        batcher: what waits, and what was computed in how many batches.
        max_rows: texts of a batch.
        num_passes: through the model since the start.
    """

    max_rows = _MAX_TEXTS

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._pooling = pooling_of(Path(str(getattr(loaded.model, "name_or_path", "") or "")))
        self._takes_company: bool | None = None
        self.num_passes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedding")
        self.batcher = Batcher(self, 2 * MAX_INPUTS, self._thread)

    async def embed(self, prompts: Sequence[Sequence[int]]) -> list[Any]:
        """One vector per prompt, float32 [hidden size], L2-normalised. Raises ApiError 429 when too many texts wait."""
        try:
            return await self.batcher.compute([list(prompt) for prompt in prompts])
        except QueueFull:
            message = f"{self.batcher.num_waiting} texts wait to be embedded. Try again in a moment."
            raise ApiError(429, message, code="overloaded", retry_after_s=_RETRY_AFTER_S) from None

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Inside, nothing is embedded: what is asked meanwhile waits."""
        begun, left = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def wait() -> None:
            loop.call_soon_threadsafe(begun.set)
            left.wait()

        waiting = loop.run_in_executor(self._thread, wait)
        waiting.add_done_callback(lambda _: begun.set())  # also where the thread has ended before it came to this
        try:
            await begun.wait()
            yield
        finally:
            left.set()
            await asyncio.wait([waiting])

    def close(self) -> None:
        """No more of it; what waits is cancelled."""
        self.batcher.stop()

    @torch.inference_mode()
    def predict(self, rows: list[list[int]]) -> list[Any]:
        """The vectors of these prompts, computed here and now."""
        if self._takes_company is None and len(rows) > 1:
            self._takes_company = self._is_same_in_company()
        vectors: list[Any] = [None] * len(rows)
        ordered = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        while ordered:
            taken = self._about_as_long([len(rows[index]) for index in ordered])
            chosen, ordered = ordered[:taken], ordered[taken:]
            for index, vector in zip(chosen, self._pass([rows[index] for index in chosen]), strict=True):
                vectors[index] = vector.cpu().numpy()
        return vectors

    def _about_as_long(self, lengths: list[int]) -> int:
        """How many, from the shortest on, go together: half of what is computed may be padding, and no more."""
        if not self._takes_company:
            return 1
        count, num_tokens = 1, lengths[0]
        while count < len(lengths):
            padded = (count + 1) * lengths[count]
            if padded > min(_MAX_TOKENS, 2 * (num_tokens + lengths[count])):
                break
            num_tokens += lengths[count]
            count += 1
        return count

    def _is_same_in_company(self) -> bool:
        vocabulary, longest = self._loaded.num_vocabulary, self._loaded.context_length
        texts = [[(5 * place + length) % vocabulary for place in range(min(length, longest))] for length in _TRIED]
        try:
            together = self._pass(texts)
            alone = torch.cat([self._pass([text]) for text in texts])
        except Exception as error:  # of any architecture's code: alone it has been tried
            log.warning("texts are embedded one by one: %s: %s", type(error).__name__, error)
            return False
        error_of = float((together - alone).abs().max())
        if not error_of <= _ROUNDING:
            log.warning("texts are embedded one by one: in company their vectors are off by %.3g", error_of)
        return error_of <= _ROUNDING

    def _pass(self, prompts: list[list[int]]) -> torch.Tensor:
        """[texts, hidden size]."""
        self.num_passes += 1
        model = self._loaded.model
        both = getattr(model.config, "is_encoder_decoder", False)
        network = model.get_encoder() if both else getattr(model, "base_model", model)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        longest = max(len(prompt) for prompt in prompts)
        padding = self._padding(model)
        tokens = torch.tensor([prompt + [padding] * (longest - len(prompt)) for prompt in prompts], device=model.device)
        mask = (torch.arange(longest, device=model.device) < lengths.unsqueeze(1)).long()
        states = network(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        if self._pooling == "cls":
            pooled = states[:, 0]
        elif self._pooling == "last":
            pooled = states[torch.arange(len(prompts), device=model.device), lengths - 1]
        else:
            pooled = (states * mask.unsqueeze(-1)).sum(dim=1) / lengths.unsqueeze(1)
        return torch.nn.functional.normalize(pooled, dim=-1)

    def _padding(self, model: Any) -> int:
        """What stands behind a shorter text: RoBERTa counts positions by it."""
        for config in (model.config, self._loaded.tokenizer):
            token = getattr(config, "pad_token_id", None)
            if isinstance(token, int) and 0 <= token < self._loaded.num_vocabulary:
                return token
        return 0
