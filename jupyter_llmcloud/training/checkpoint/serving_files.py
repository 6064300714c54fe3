"""What the checkpoints of a run lack to be served while it trains: the configuration and the tokenizer of its model.

A checkpoint holds the weights as safetensors. Beside them, once a run, `<run>/serving` gets what `save_pretrained`
writes of everything else, the architecture of a model that no library has, and `weights.json`: the names and shapes by
which the model is found among those of a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.storage.models.followed_model import SERVING, WEIGHTS
from jupyter_llmcloud.system.atomic_files import publish_folder
from jupyter_llmcloud.training import architecture
from jupyter_llmcloud.training.parallel.plans import layout_of
from jupyter_llmcloud.training.parallel.unwrap import plain_class, unwrapped


def write_once(names: Sequence[str], namespace: Mapping[str, Any], run: Path) -> None:
    """Write them, when the variables that the run saves in the end are there: a model, a tokenizer."""
    folder = run / SERVING
    if folder.exists():
        return
    values = [namespace.get(name) for name in names]
    whole = next((value for value in values if isinstance(value, torch.nn.Module)), None)
    if whole is None:
        return
    model = unwrapped(whole)
    staging = folder.with_name(f".{SERVING}.staging")
    staging.mkdir(parents=True, exist_ok=True)
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        model.config.architectures = model.config.architectures or [plain_class(model).__name__]
        model.config.save_pretrained(staging)
    if architecture.is_own(model):
        architecture.write(model, staging)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(staging)
    for value in values:
        if not isinstance(value, torch.nn.Module) and value is not None:
            _save_tokenizer(value, staging)
    # Not by the state dict of the model itself: a part that is spread over the ranks could gather itself there.
    (staging / WEIGHTS).write_text(json.dumps(layout_of(whole).shapes(whole)))
    publish_folder(staging, folder, durable=False)


def _save_tokenizer(value: Any, folder: Path) -> None:
    if type(value).__module__.startswith("tokenizers"):
        from transformers import PreTrainedTokenizerFast

        value = PreTrainedTokenizerFast(tokenizer_object=value)
    if hasattr(value, "save_pretrained"):
        value.save_pretrained(folder)
