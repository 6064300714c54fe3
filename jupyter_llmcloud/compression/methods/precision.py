"""Weights in bfloat16: half of the bytes of float32, with the range of float32 and fewer digits."""

from __future__ import annotations

from pathlib import Path

import torch

from jupyter_llmcloud.compression.methods.plain import check_plain
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel


def to_bfloat16(loaded: LoadedModel, folder: Path) -> str:
    """Write the model with such weights; returns a note. Raises ModelError when they are small already."""
    check_plain(loaded)
    was = loaded.model.dtype
    if was.itemsize <= torch.bfloat16.itemsize:
        raise ModelError(
            f"bf16 makes this model no smaller: its weights are {str(was).removeprefix('torch.')} already."
        )
    loaded.model.to(torch.bfloat16).save_pretrained(folder)
    return f"weights of {str(was).removeprefix('torch.')} in bfloat16"
