"""An adapter of PEFT (LoRA and its kin) put on its base model, as one model: served like any other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.storage.model_folder import ADAPTER, ADAPTER_WEIGHTS


def merged(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder` merged into its weights; raises ModelError when they do not fit."""
    adapted = _adapted(model, folder)
    if not hasattr(adapted, "merge_and_unload") or not hasattr(adapted.base_model, "merge_and_unload"):
        kind = json.loads((folder / ADAPTER).read_bytes()).get("peft_type")
        raise ModelError(f"{folder} holds an adapter of kind {kind}, which cannot be merged into a model.")
    return adapted.merge_and_unload(safe_merge=True)


def attached(model: Any, folder: Path) -> Any:
    """`model` with the layers of the adapter in `folder` beside its own, whose weights stay as they are.

    Raises ModelError when they do not fit, or when the adapter has embeddings of its own.
    """
    num_tokens = model.get_input_embeddings().weight.shape[0]
    with_layers = _adapted(model, folder)
    plain = with_layers.base_model.model if hasattr(with_layers, "base_model") else with_layers
    if plain.get_input_embeddings().weight.shape[0] != num_tokens:
        raise ModelError(f"the adapter in {folder} adds tokens: serve it under a name of its own.")
    return plain.eval()


def _adapted(model: Any, folder: Path) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            f"{folder} holds an adapter, and peft, which reads it, is not installed where models are served: "
            "pip install 'jupyter-llmcloud[peft]'. Or save the merged model: "
            "model.merge_and_unload().save_pretrained(folder)."
        )
    from peft import PeftModel
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    _fit_embeddings(model, saved)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False, torch_device="cpu")
    except RuntimeError as error:
        raise ModelError(f"the adapter in {folder} does not fit its base model: {error}") from error
    _check_complete(folder, adapted, set(saved))
    return adapted


def _fit_embeddings(model: Any, saved: dict[str, tuple[int, ...]]) -> None:
    """Tokens were added before the adapter was trained: its embeddings have more rows than the base model's."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    rows = [shape[0] for key, shape in saved.items() if key.endswith(f"{name}.weight")]
    if rows and rows[0] != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows[0], mean_resizing=False)


def _check_complete(folder: Path, adapted: Any, saved: set[str]) -> None:
    """The library only warns of what the file lacks, and is silent about what it has too much."""
    from peft import get_peft_model_state_dict

    used = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    missing = sorted(used - saved)
    unknown = sorted(name for name in saved - used if "lora_" in name)
    if missing or unknown:
        named = ", ".join([*missing, *unknown][:3])
        raise ModelError(
            f"the adapter in {folder} does not fit its base model: {len(missing)} weights are missing and "
            f"{len(unknown)} are not used ({named}). Name the model that it was trained on: --base-model FOLDER."
        )
