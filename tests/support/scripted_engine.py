"""An engine whose answers a test writes: it says a text, or any that a grammar allows, and scores by a forward pass."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from jupyter_llmcloud.inference.engines.base import EngineStats, Generation, TokenLogprob, TokenStream
from jupyter_llmcloud.inference.engines.loading import LoadedModel


class ScriptedEngine:
    """Says `text`, then ends. What must follow a grammar is drawn from what that allows, and ends when it may.

    Attributes:
        generations: what was asked so far.
    """

    name = "scripted"
    unsupported: frozenset[str] = frozenset()
    context_length = 512
    num_parallel = 8
    num_threads = 1

    def __init__(self, loaded: LoadedModel, text: str = "") -> None:
        self.text = text
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.generations: list[Generation] = []
        self._loaded = loaded
        self._chance = random.Random(0)

    def submit(self, generation: Generation) -> TokenStream:
        stream = TokenStream(lambda: None)
        self.generations.append(generation)
        loop = asyncio.get_running_loop()
        if generation.score_prompt:
            stream.push([], self._scores(generation), None if generation.max_tokens else "length")
        tokens = self._tokens(generation)[: generation.max_tokens]
        ends = bool(tokens) and tokens[-1] in self._loaded.eos
        for number, token in enumerate(tokens):
            last = number == len(tokens) - 1
            entries = [] if generation.sampling.num_logprobs is None else [TokenLogprob(token, -0.5, ((token, -0.5),))]
            reason = None if not last else "stop" if ends else "length"
            loop.call_later(0.003 * number, stream.push, [token], entries, reason)
        return stream

    def _tokens(self, generation: Generation) -> list[int]:
        eos = min(self._loaded.eos)
        if generation.constraint is None:
            return [*self._loaded.tokenizer(self.text)["input_ids"], eos]
        tokens: list[int] = []
        while len(tokens) < generation.max_tokens and (not tokens or tokens[-1] != eos):
            mask = generation.constraint.allowed()
            allowed = [token for token in range(self._loaded.num_vocabulary) if mask[token // 8] >> token % 8 & 1]
            quotes = [token for token in allowed if self._loaded.tokenizer.decode([token]) in ('"', "}", '"}')]
            token = eos if eos in allowed else self._chance.choice(quotes if quotes and len(allowed) > 50 else allowed)
            tokens.append(token)
            generation.constraint.accept(token)
        return tokens

    def _scores(self, generation: Generation) -> list[TokenLogprob]:
        import torch

        prompt = list(generation.prompt)
        with torch.inference_mode():
            rows = self._loaded.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        count = generation.sampling.num_logprobs or 0
        return [
            TokenLogprob(
                token,
                float(row[token]),
                tuple(zip(*(part.tolist() for part in reversed(row.topk(count))), strict=True)) if count else (),
            )
            for row, token in zip(rows, prompt[1:], strict=False)
        ]

    def stats(self) -> EngineStats:
        return EngineStats(0, 0)

    async def close(self) -> None:
        """Nothing goes on."""
