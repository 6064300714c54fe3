"""Tokenizers: what is kept of one, and what of it is sent to where texts become tokens."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets.fingerprints import canonical_definition, fingerprint
from jupyter_llmcloud.storage.datasets.manifest import Tokenizer

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
    vocabulary = getattr(tokenizer, "vocab_size", None)
    told = Tokenizer(
        name=str(getattr(tokenizer, "__qualname__", type(tokenizer).__name__)),
        fingerprint=fingerprint(tokenizer),
        vocab_size=len(tokenizer) if hasattr(tokenizer, "__len__") else vocabulary or 1 << 31,
        eos=getattr(tokenizer, "eos_token_id", None),
        pad=getattr(tokenizer, "pad_token_id", None) or 0,
    )
    return told, tokenizer


def _from_name(name: str) -> tuple[Tokenizer, Any]:
    path = Path(os.path.expanduser(name))
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
    told = Tokenizer(
        name=name,
        fingerprint=hashlib.sha256(canonical_definition(text).encode()).hexdigest(),
        vocab_size=made.get_vocab_size(with_added_tokens=True),
        eos=eos,
        pad=pad if pad is not None else eos if eos is not None else 0,
    )
    return told, text
