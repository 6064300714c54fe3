"""What people write who serve a model of transformers by batches of requests: greedy, the batch ends when all have ended.

Run by the environments of the peers that have no engine of their own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, DynamicCache


class StaticBatches:
    """A model that answers batches of OpenAI's requests for completions, all of the same length."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    @torch.inference_mode()
    def stream(self, requests: list[dict[str, Any]]) -> Iterator[list[str]]:
        """For each step, an event for each request; an empty one for those that have ended."""
        ids = torch.tensor([request["prompt"] for request in requests])
        limits = [request["max_tokens"] for request in requests]
        decoders = [DecodeStream(skip_special_tokens=True) for _ in requests]
        cache = DynamicCache(config=self._model.config)
        for number in range(1, max(limits) + 1):
            logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            chosen = ids[:, 0].tolist()
            yield [
                self._event(decoder, token, number == limit) if number <= limit else ""
                for decoder, token, limit in zip(decoders, chosen, limits, strict=True)
            ]

    def _event(self, decoder: DecodeStream, token: int, is_last: bool) -> str:
        text = decoder.step(self._tokenizer, token) or ""
        choice = {"index": 0, "text": text, "finish_reason": "length" if is_last else None}
        return f"data: {json.dumps({'object': 'text_completion', 'choices': [choice]})}\n\n"
