"""Texts to tokens, tokens to rows of one length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets.manifest import Tokenizer

Encode = Callable[[list[str]], list[Any]]


def encoder(tokenizer: Any) -> Encode:
    """What makes lists of token ids of texts, from what `pack_tokenizer` has sent."""
    if isinstance(tokenizer, str):
        import tokenizers

        made = tokenizers.Tokenizer.from_str(tokenizer)
        made.no_truncation()
        made.no_padding()
        encode = getattr(made, "encode_batch_fast", made.encode_batch)
        return lambda texts: [found.ids for found in encode(texts, add_special_tokens=False)]
    if hasattr(tokenizer, "encode") and hasattr(tokenizer, "convert_ids_to_tokens"):  # of transformers
        return lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return lambda texts: [tokenizer(text) for text in texts]


class Packer:
    """Cuts a stream of documents into rows of `seq_len` tokens, with the token `eos` after each document.

    Args:
        check: of ids against the size of the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int) -> None:
        import numpy as np

        self._np = np
        self._told = tokenizer
        self._seq_len = seq_len
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        self._rest = np.empty(0, self.dtype)
        self.num_tokens = 0

    def add(self, documents: Iterable[Sequence[int]]) -> Any:
        """The full rows, (rows, seq_len), that these documents complete."""
        np = self._np
        flat: list[int] = []
        eos = [] if self._told.eos is None else [self._told.eos]
        try:
            for ids in documents:
                flat += ids
                flat += eos
            new = np.asarray(flat) if flat else np.empty(0, np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"the tokenizer {self._told.name!r} gave what is no list of token ids: {error}.") from None
        if new.dtype.kind not in "iu" or new.ndim != 1:
            wrong = next((each for each in flat if not isinstance(each, SupportsIndex)), flat[0])
            raise UsageError(f"the tokenizer {self._told.name!r} gave {wrong!r:.60}, which is no token id.")
        if new.size and (new.min() < 0 or new.max() >= self._told.vocab_size):
            wrong = new.min() if new.min() < 0 else new.max()
            raise UsageError(
                f"the tokenizer {self._told.name!r} gave the id {int(wrong)}, "
                f"outside its vocabulary of {self._told.vocab_size}."
            )
        self.num_tokens += new.size
        stream = np.concatenate([self._rest, new.astype(self.dtype)])
        num_rows = stream.size // self._seq_len
        rows = stream[: num_rows * self._seq_len].reshape(num_rows, self._seq_len)
        self._rest = stream[num_rows * self._seq_len :].copy()
        return rows

    def finish(self) -> tuple[Any, int]:
        """The last row, filled up, as (1, seq_len) or (0, seq_len), and how many of its tokens are no filling."""
        np, rest = self._np, self._rest
        self._rest = np.empty(0, self.dtype)
        if not rest.size:
            return np.empty((0, self._seq_len), self.dtype), 0
        row = np.full((1, self._seq_len), self._told.pad, self.dtype)
        row[0, : rest.size] = rest
        return row, int(rest.size)
