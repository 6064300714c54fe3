"""An adapter of PEFT put into the weights of its base model: one model, as fast as that."""

from __future__ import annotations

from pathlib import Path

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.storage.model_folder import ModelLayout


def merge(loaded: LoadedModel, layout: ModelLayout, folder: Path) -> str:
    """Write the merged model, which loading has made; returns a note. Raises ModelError when there is no adapter."""
    if layout.adapter is None:
        raise ModelError(
            "lora-merge is for adapters of PEFT, and this is a whole model: there is nothing to merge. Train one with "
            "get_peft_model(model, LoraConfig(...)) and --save model,tokenizer."
        )
    loaded.model.save_pretrained(folder)
    return f"the adapter in the weights of {layout.folder.name}"
