"""Models that only embed: a folder of a BERT or its like to what answers /v1/embeddings and /v1/tokenize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.soundness import check_finite, check_weights
from jupyter_llmcloud.inference.openai.embedding.embedder import Embedder
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary
from jupyter_llmcloud.storage.model_folder import ModelLayout

_SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_DEFAULT_CONTEXT = 512
# Layers behind the last hidden state, which vectors are not made of: they may lack, or be left over.
_HEADS = ("pooler.", "cls.", "lm_head.", "predictions.", "vocab_", "generator_", "discriminator_", "head.", "decoder.")


class ServedEncoder:
    """A model that embeds texts, and generates none.

    Attributes:
        loaded: the model and its tokenizer.
        served_name: the name that requests must use.
        vocabulary: what its tokens add to a text.
        embedder: what embeds.
        templates: none: it knows no conversations.
    """

    templates = None

    def __init__(self, loaded: LoadedModel, served_name: str) -> None:
        self.loaded = loaded
        self.served_name = served_name
        self.vocabulary = Vocabulary(loaded.tokenizer)
        self.embedder = Embedder(loaded)

    @property
    def context_length(self) -> int:
        """Tokens of one text at most."""
        return self.loaded.context_length

    def adapter_of(self, name: str) -> str:
        """ "", for its own name; raises `ApiError` 404 for any other."""
        if name != self.served_name:
            message = f"The model {name[:128]!r} does not exist here: this endpoint serves {self.served_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return ""

    def close(self) -> None:
        """No more of it."""
        self.embedder.close()


def open_encoder(layout: ModelLayout, served_name: str, dtype: str, device: str) -> ServedEncoder:
    """Load it and embed a text for a trial; raises ModelError with what is missing or wrong."""
    folder = layout.folder
    if layout.adapter is not None or layout.architecture is not None:
        raise ModelError(
            f"{layout.adapter or folder}: an adapter of a model that embeds is not served. Merge it first."
        )
    try:
        served = ServedEncoder(_load(layout, dtype, device), served_name)
        _try(served)
        return served
    except ModelError:
        raise
    except Exception as error:
        # Much code of others runs here on files of others: whatever it raises is about this folder.
        raise ModelError(f"{folder} could not be loaded: {type(error).__name__}: {error}") from error


def _load(layout: ModelLayout, dtype: str, device: str) -> LoadedModel:
    from transformers import AutoTokenizer

    folder = layout.folder
    tokenizer = AutoTokenizer.from_pretrained(layout.tokenizer, **_SAFE)
    options: dict[str, Any] = {**_SAFE, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, report = _class_of(folder).from_pretrained(folder, **options)
    for name in ("missing_keys", "unexpected_keys"):
        report[name] = [key for key in report.get(name) or () if not _is_head(str(key))]
    check_weights(folder, report)
    check_finite(folder, model)
    num_vocabulary = model.get_input_embeddings().weight.shape[0]
    return LoadedModel(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        context_length=_context_length(model, tokenizer),
        num_vocabulary=num_vocabulary,
        eos=frozenset(),
        is_encoder_decoder=True,  # a text is given whole, with what the tokenizer puts around it
    )


def _class_of(folder: Path) -> Any:
    """The class that saved it, when that is a network without a head; else the one that its config has."""
    import transformers

    for name in json.loads((folder / "config.json").read_bytes()).get("architectures") or ():
        known = getattr(transformers, str(name), None)
        if str(name).endswith(("Model", "Encoder")) and hasattr(known, "from_pretrained"):
            return known
    return transformers.AutoModel


def _is_head(name: str) -> bool:
    return any(name.startswith(head) or (f".{head}" in name and head == "pooler.") for head in _HEADS)


def _context_length(model: Any, tokenizer: Any) -> int:
    """Tokens of one text at most: as the tokenizer says, and as many as have positions."""
    known = [limit] if 0 < (limit := getattr(tokenizer, "model_max_length", 0) or 0) < 10_000_000 else []
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        first = 0
        for name, module in model.named_modules():  # RoBERTa counts from behind its padding
            if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
                first = 0 if module.padding_idx is None else module.padding_idx + 1
        known.append(positions - first)
    return min(known, default=_DEFAULT_CONTEXT)


def _try(served: ServedEncoder) -> None:
    tokens = list(served.loaded.tokenizer("a", verbose=False)["input_ids"])[: served.context_length]
    [vector] = served.embedder.predict([tokens or [0]])
    size = served.loaded.model.config.get_text_config().hidden_size
    if vector.shape != (size,) or not abs(float((vector**2).sum()) - 1) < 1e-3:
        raise ModelError(f"the model gives no vector of length 1 for a text, but {vector.shape}: it is no encoder.")
