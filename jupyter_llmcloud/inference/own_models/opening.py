"""A model of the user's own as one that generates: from the folder of its run, or as an object of a kernel."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from jupyter_llmcloud.inference.architecture import load_own
from jupyter_llmcloud.inference.engines.loading import (
    LoadedModel,
    load_model,
    loaded_of,
    loading,
    refuse_spread,
    shortened,
)
from jupyter_llmcloud.inference.engines.soundness import check_vocabulary
from jupyter_llmcloud.inference.engines.trial import why_one_at_a_time
from jupyter_llmcloud.inference.open_inference.modules import ModulePredictor
from jupyter_llmcloud.inference.open_inference.routes import ServedPredictor
from jupyter_llmcloud.inference.own_models.causal_module import CausalModule, NotAGenerator, as_generator
from jupyter_llmcloud.inference.own_models.objects import TOKENIZER, module_of, unpickled
from jupyter_llmcloud.storage.model_folder import check_folder


def load_folder(folder: Path, dtype: str, device: str, max_length: int | None) -> LoadedModel:
    """A model that a run of the user's own has saved, by the architecture that is kept beside its weights.

    Raises NotAGenerator when it generates no text, ModelError when it cannot be loaded.
    """
    layout = check_folder(folder, is_own=True)
    if layout.architecture is None:
        return load_model(folder, dtype=dtype, device=device, max_model_len=max_length)
    refuse_spread(device, "an architecture of a cell")
    with loading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return shortened(as_loaded(load_own(layout.architecture, folder, dtype, device), tokenizer), max_length)


def load_object(path: Path, dtype: str, device: str, max_length: int | None) -> LoadedModel:
    """A kept model with its tokenizer. Raises NotAGenerator when it generates no text."""
    value = unpickled(path)
    if not isinstance(value, dict) or TOKENIZER not in value:
        raise NotAGenerator("it has no tokenizer")
    module = module_of(value)
    if not isinstance(module, torch.nn.Module):
        raise NotAGenerator(f"it is a {type(module).__name__}")
    module = module if dtype == "auto" else module.to(getattr(torch, dtype))
    return shortened(as_loaded(module.to(device).eval(), value[TOKENIZER]), max_length)


def as_loaded(module: Any, tokenizer: Any) -> LoadedModel:
    """A model of a class of its own; by its own `generate` where it has one, else by its forward alone."""
    return _by_generate(module, tokenizer) or as_generator(module, tokenizer)


def without_generate(loaded: LoadedModel) -> LoadedModel:
    """The same model by its forward alone. Raises NotAGenerator, also when it is that already."""
    if isinstance(loaded.model, CausalModule):
        raise NotAGenerator(f"{type(loaded.model.module).__name__} is generated with by its forward alone already")
    other = as_generator(loaded.model, loaded.tokenizer, loaded.context_length)
    return dataclasses.replace(other, context_length=loaded.context_length, cache_bytes=loaded.cache_bytes)


def open_forward(loaded: LoadedModel, name: str, max_rows: int) -> ServedPredictor | None:
    """The same module asked by tensors, beside text; None where it keeps a state, which the two would mix."""
    if why_one_at_a_time(loaded) is not None:
        return None
    module = loaded.model.module if isinstance(loaded.model, CausalModule) else loaded.model
    thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
    return ServedPredictor(ModulePredictor(module, max_rows), name, max_rows, thread)


def _by_generate(module: Any, tokenizer: Any) -> LoadedModel | None:
    """By the `generate` of transformers; None where its class has not all that it takes."""
    if not isinstance(module, PreTrainedModel) or not module.can_generate():
        return None
    try:
        has_embeddings = hasattr(module.get_input_embeddings(), "weight")
    except (NotImplementedError, AttributeError):
        has_embeddings = False
    if not has_embeddings:
        return None
    check_vocabulary(f"the {type(module).__name__}", module, tokenizer)
    return loaded_of(f"the {type(module).__name__}", module, module.config, tokenizer)
