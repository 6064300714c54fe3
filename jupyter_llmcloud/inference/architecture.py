"""A model whose architecture a run has kept beside its weights, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cloudpickle
import torch
from safetensors.torch import load_file

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.soundness import check_finite, check_weights


def load_own(architecture: Path, folder: Path, dtype: str, device: str) -> Any:
    """The module that a run saved: its architecture, trusted because it is the user's own, with its weights.

    Raises ModelError when they are not of one model, or when the architecture cannot be made here.
    """
    try:
        module = cloudpickle.loads(architecture.read_bytes())
    except Exception as error:
        raise ModelError(
            f"the architecture of this run cannot be made where it is served: {type(error).__name__}: {error}. Modules "
            "that its cell imports must be importable there: install them, or keep them beside the notebook."
        ) from error
    module = _from_pretrained(module, folder) if (folder / "config.json").is_file() else _with_weights(module, folder)
    check_finite(folder, module)
    if dtype != "auto":
        module = module.to(getattr(torch, dtype))
    return module.to(device).eval()


def _from_pretrained(module: Any, folder: Path) -> Any:
    """As transformers loads a class of its own: weights that it saved under other names find their places."""
    kind = type(module)
    if not hasattr(kind, "from_pretrained"):
        return _with_weights(module, folder)
    try:
        loaded, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except TypeError:  # a class that wants more than its configuration to be made
        return _with_weights(module, folder)
    check_weights(folder, report)
    return loaded


def _with_weights(module: Any, folder: Path) -> Any:
    saved: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        saved |= load_file(file)
    try:
        missing, unexpected = module.load_state_dict(saved, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{folder} is not the model that its run saved: {error}") from None
    state = module.state_dict(keep_vars=True)
    present = {state[name].data_ptr() for name in saved if name in state}
    lost = [name for name in missing if state[name].data_ptr() not in present]
    if lost or unexpected:
        raise ModelError(
            f"{folder} is not the model that its run saved: {len(lost)} weights are missing and {len(unexpected)} are "
            f"not known ({', '.join([*lost, *unexpected][:3])})."
        )
    return module
