"""An object that a kernel has kept for a replica: Python code, or a model, perhaps with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cloudpickle

from jupyter_llmcloud.errors import ModelError

MODEL, TOKENIZER = "model", "tokenizer"  # of an object that is a model with its tokenizer


def unpickled(path: Path) -> Any:
    """The object in a file. Raises ModelError."""
    try:
        return cloudpickle.loads(path.read_bytes())
    except Exception as error:
        raise ModelError(
            f"the object cannot be unpickled where it is served: {type(error).__name__}: {error}"
        ) from error


def module_of(value: Any) -> Any:
    """The model in what was kept: alone, or with its tokenizer; with adapters of PEFT merged into it."""
    model = value[MODEL] if isinstance(value, dict) else value
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
