"""Texts to tokens, tokens to rows of one length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets.manifest import Tokenizer

Encode = Callable[[list[str]], list[Any]]
_EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|im_end|>")


def pack_tokenizer(tokenizer: Any) -> tuple[Tokenizer, Any]:
    """What is kept of a tokenizer, and what is sent to the workers.

    A fast tokenizer of Hugging Face travels as its definition, so that no worker imports transformers; any other
    object, or a function from a text to a list of token ids, travels by value.

    Args:
        tokenizer: such an object, or a folder with a `tokenizer.json`, that file, or a name on the Hugging Face hub.
    """
    if isinstance(tokenizer, str | Path):
        return _from_name(str(tokenizer))
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if type(backend).__module__.startswith("tokenizers"):
        eos = getattr(tokenizer, "eos_token_id", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        return _from_definition(backend.to_str(), name, eos, pad)
    if not callable(tokenizer):
        raise UsageError(
            f"tokenizer={tokenizer!r:.80} is none: give a tokenizer of Hugging Face, its name or folder, or a function "
            "from a text to a list of numbers."
        )
    import cloudpickle

    vocabulary = getattr(tokenizer, "vocab_size", None)
    told = Tokenizer(
        name=str(getattr(tokenizer, "__qualname__", type(tokenizer).__name__)),
        fingerprint=_hash(_source(tokenizer) or cloudpickle.dumps(tokenizer)),
        vocab_size=len(tokenizer) if hasattr(tokenizer, "__len__") else vocabulary or 1 << 31,
        eos=getattr(tokenizer, "eos_token_id", None),
        pad=getattr(tokenizer, "pad_token_id", None) or 0,
    )
    return told, tokenizer


def _source(function: Any) -> bytes:
    import inspect

    try:
        return inspect.getsource(function).encode()
    except (TypeError, OSError):
        return b""


def _from_name(name: str) -> tuple[Tokenizer, Any]:
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        eos = _configured(file.parent)
        return _from_definition(file.read_text(encoding="utf-8"), name, eos, None)
    if path.exists():
        raise UsageError(f"tokenizer {name!r} is a folder without a tokenizer.json.")
    import tokenizers

    try:
        found = tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:
        raise UsageError(
            f"tokenizer {name!r} is no folder here and cannot be had from the Hugging Face hub: {error}."
        ) from None
    return _from_definition(found.to_str(), name, None, None)


def _configured(folder: Path) -> str | None:
    try:
        told = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError):
        return None
    return told.get("content") if isinstance(told, dict) else told


def _from_definition(text: str, name: str, eos: int | str | None, pad: int | None) -> tuple[Tokenizer, str]:
    import tokenizers

    try:
        made = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        raise UsageError(f"the tokenizer {name!r} cannot be read: {error}.") from None
    if isinstance(eos, str):
        eos = made.token_to_id(eos)
    if eos is None:
        eos = next((found for word in _EOS_NAMES if (found := made.token_to_id(word)) is not None), None)
    canonical = json.dumps({**json.loads(text), "truncation": None, "padding": None}, sort_keys=True)
    told = Tokenizer(
        name=name,
        fingerprint=_hash(canonical.encode()),
        vocab_size=made.get_vocab_size(with_added_tokens=True),
        eos=eos,
        pad=pad if pad is not None else eos if eos is not None else 0,
    )
    return told, text


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def encoder(tokenizer: Any) -> Encode:
    """What makes lists of token ids of texts, from what `pack_tokenizer` has sent."""
    if isinstance(tokenizer, str):
        import tokenizers

        made = tokenizers.Tokenizer.from_str(tokenizer)
        made.no_truncation()
        made.no_padding()
        encode = getattr(made, "encode_batch_fast", made.encode_batch)
        return lambda texts: [found.ids for found in encode(texts, add_special_tokens=False)]
    if hasattr(tokenizer, "encode"):
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
        for ids in documents:
            flat += ids
            flat += eos
        try:
            new = np.array(flat, dtype=np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"the tokenizer {self._told.name!r} gave what are no token ids: {error}.") from None
        if new.size and (new.min() < 0 or new.max() >= self._told.vocab_size):
            raise UsageError(
                f"the tokenizer {self._told.name!r} gave the id {int(new.max() if new.max() > 0 else new.min())}, "
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
