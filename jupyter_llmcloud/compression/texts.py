"""Texts that methods look at: given ones, or such as a model writes by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.inference.engines.loading import LoadedModel

NUM_WRITTEN, LONGEST_WRITTEN = 32, 128
_SEED = 1


def read_texts(file: str) -> list[str]:
    """The list that the client has written. Raises UsageError when there is no text in it."""
    texts = [text for text in json.loads(Path(file).read_bytes()) if text.strip()]
    if not texts:
        raise UsageError("the text that was given is empty.")
    return texts


def written_by(loaded: LoadedModel) -> list[str]:
    """Texts that the model writes when it is asked nothing, always the same ones."""
    import torch

    start = loaded.tokenizer.bos_token_id
    start = start if start is not None else min(loaded.eos, default=0)
    length = min(LONGEST_WRITTEN, loaded.context_length - 1)
    state = torch.random.get_rng_state()
    torch.manual_seed(_SEED)
    try:
        rows = loaded.model.generate(
            torch.full((NUM_WRITTEN, 1), start),
            attention_mask=torch.ones(NUM_WRITTEN, 1, dtype=torch.long),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            pad_token_id=next(iter(sorted(loaded.eos)), 0),
        )
    finally:
        torch.random.set_rng_state(state)
    return [loaded.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def windows(texts: Sequence[str], tokenizer: Any, length: int, most: int) -> Iterator[list[int]]:
    """The tokens of texts, one behind the other with an end between two, in pieces of `length`; the last is shorter."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    row: list[int] = []
    for text in texts:
        row += tokenizer(text, add_special_tokens=False)["input_ids"] + end
        while len(row) >= length and most > 0:
            yield row[:length]
            row, most = row[length:], most - length
        if most <= 0:
            return
    if len(row) > 1:
        yield row
