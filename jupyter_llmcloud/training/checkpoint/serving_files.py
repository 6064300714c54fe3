"""What the checkpoints of a run lack to be served while it trains: the configuration and the tokenizer of its model.

A checkpoint holds the weights as safetensors. Beside them, once a run, `<run>/serving` gets what `save_pretrained`
writes of everything else, and `weights.json`: the names and shapes by which the model is found among those of a
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.storage.models.followed_model import SERVING, WEIGHTS
from jupyter_llmcloud.system.atomic_files import publish_folder
from jupyter_llmcloud.training.parallel.unwrap import unwrapped


def write_once(names: Sequence[str], namespace: Mapping[str, Any], run: Path) -> None:
    """Write them, when the variables that the run saves in the end are there: a model of transformers, a tokenizer."""
    folder = run / SERVING
    if folder.exists():
        return
    values = [namespace.get(name) for name in names]
    model = next((unwrapped(value) for value in values if isinstance(value, torch.nn.Module)), None)
    if model is None or not hasattr(model, "config") or not hasattr(model.config, "save_pretrained"):
        return
    staging = folder.with_name(f".{SERVING}.staging")
    staging.mkdir(parents=True, exist_ok=True)
    model.config.architectures = model.config.architectures or [type(model).__name__]
    model.config.save_pretrained(staging)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(staging)
    for value in values:
        if not isinstance(value, torch.nn.Module) and value is not None:
            _save_tokenizer(value, staging)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    (staging / WEIGHTS).write_text(json.dumps(shapes))
    publish_folder(staging, folder, durable=False)


def _save_tokenizer(value: Any, folder: Path) -> None:
    if type(value).__module__.startswith("tokenizers"):
        from transformers import PreTrainedTokenizerFast

        value = PreTrainedTokenizerFast(tokenizer_object=value)
    if hasattr(value, "save_pretrained"):
        value.save_pretrained(folder)
