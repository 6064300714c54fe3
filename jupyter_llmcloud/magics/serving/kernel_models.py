"""Models of transformers that a kernel has, written where the server serves from: torch is not imported for that."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.names import type_in_words
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.models import served_code

_FOLDER = "models"  # below that of code
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}


def unwrapped(value: Any) -> Any:
    """The model in its wrappers of torch."""
    while type(value).__module__.startswith("torch.") and (inner := _WRAPPERS.get(type(value).__name__)):
        value = getattr(value, inner)
    return value


def is_of_transformers(value: Any) -> bool:
    """Whether a class that transformers has itself can load it again from its files."""
    return type(value).__module__.startswith("transformers.") and callable(getattr(value, "save_pretrained", None))


def write(model: Any, tokenizer: Any, name: str, root: Path) -> Path:
    """Write a model and its tokenizer (or processor) as a new folder; returns it. Raises UsageError."""
    folder = served_code.folder(root) / _FOLDER / f"{name}-{secrets.token_hex(6)}"
    folder.mkdir(mode=0o700, parents=True)
    try:
        with _no_progress_bars():
            model.save_pretrained(folder)
            if tokenizer is not None:
                _writable(tokenizer).save_pretrained(folder)
    except Exception as error:  # of a library, on a value of the user's
        raise UsageError(f"{type_in_words(model)} cannot be written: {type(error).__name__}: {error}") from error
    return folder


def is_kept(path: str) -> bool:
    """Whether a served folder is one that `write` has made."""
    return Path(path).parent.name == _FOLDER and Path(path).parent.parent.name == served_code.folder().name


def _writable(tokenizer: Any) -> Any:
    if type(tokenizer).__module__.partition(".")[0] == "tokenizers":
        return sys.modules["transformers"].PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return tokenizer


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    logging = sys.modules["transformers"].utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
