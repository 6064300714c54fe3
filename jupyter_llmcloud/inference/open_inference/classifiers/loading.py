"""A folder to a model behind the Open Inference Protocol: safetensors only, never code from the folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.soundness import check_finite, check_weights
from jupyter_llmcloud.inference.open_inference.predictor import Predictor
from jupyter_llmcloud.storage.model_folder import ModelLayout

log = logging.getLogger(__name__)

_SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
TRANSFORMERS_KINDS = ("classifier", "regressor", "token-classifier", "image-classifier")


def load_predictor(layout: ModelLayout, kind: str, *, dtype: str, device: str, max_rows: int) -> Predictor:
    """Load a classifier or a regressor of transformers; raises ModelError with what is missing or wrong."""
    try:
        return _load(layout, kind, dtype, device, max_rows)
    except ModelError:
        raise
    except Exception as error:
        # Much code of others runs here on files of others: whatever it raises is about this folder.
        folder = layout.adapter or layout.folder
        raise ModelError(f"{folder} could not be loaded: {type(error).__name__}: {error}") from error


def _load(layout: ModelLayout, kind: str, dtype: str, device: str, max_rows: int) -> Predictor:
    from transformers import AutoTokenizer

    from jupyter_llmcloud.inference.open_inference.classifiers.images import ImageClassifier
    from jupyter_llmcloud.inference.open_inference.classifiers.text import TextClassifier, TokenClassifier

    model = load_transformer(layout, kind, dtype).to(device)
    if kind == "image-classifier":
        return ImageClassifier(model, image_processor(layout.folder), max_rows)
    tokenizer = AutoTokenizer.from_pretrained(layout.tokenizer, **_SAFE)
    if kind == "token-classifier":
        return TokenClassifier(model, tokenizer, kind, max_rows)
    return TextClassifier(model, tokenizer, kind, max_rows)


def load_transformer(layout: ModelLayout, kind: str, dtype: str) -> Any:
    """The model alone, to be asked; raises ModelError when its weights are not all there, or not finite."""
    from transformers import (
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    classes: dict[str, Any] = {
        "token-classifier": AutoModelForTokenClassification,
        "image-classifier": AutoModelForImageClassification,
    }
    auto = classes.get(kind, AutoModelForSequenceClassification)
    options: dict[str, Any] = {**_SAFE, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    adapted = _adapter_labels(layout)
    model, report = auto.from_pretrained(layout.folder, ignore_mismatched_sizes=True, **options, **adapted)
    if layout.adapter is None:
        check_weights(layout.folder, report)
    else:  # whose base has no such head yet: the adapter brings it
        from jupyter_llmcloud.inference.engines.adapters import merged

        head = {str(name) for name in report.get("missing_keys") or ()}
        model = merged(model, layout.adapter)
        _check_head(layout.adapter, head)
    check_finite(layout.adapter or layout.folder, model)
    return model.eval()


def _adapter_labels(layout: ModelLayout) -> dict[str, Any]:
    """The number of labels of a classifier that an adapter makes of its base, from the head that it saved."""
    if layout.adapter is None:
        return {}
    sizes = [shape[0] for name, shape in _saved(layout.adapter).items() if _is_head(name) and len(shape) == 2]
    return {"num_labels": sizes[-1]} if sizes else {}


def _is_head(name: str) -> bool:
    parts = name.split(".")
    return name.endswith(".weight") and any(part in ("score", "classifier", "out_proj") for part in parts)


def _check_head(adapter: Path, missing: set[str]) -> None:
    """Weights that the base model lacks must have come with the adapter, or they are random numbers."""
    saved = _saved(adapter)
    left = sorted(name for name in missing if not any(key.endswith(f".{name}") or key.endswith(name) for key in saved))
    if left:
        raise ModelError(
            f"the adapter in {adapter} lacks {len(left)} weights of its model's head ({', '.join(left[:3])}), which "
            'would be random numbers. Train it with modules_to_save=["classifier"], or task_type "SEQ_CLS".'
        )


def _saved(adapter: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    from jupyter_llmcloud.storage.model_folder import ADAPTER_WEIGHTS

    with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def image_processor(folder: Path) -> Any:
    """None when the folder has none; raises ModelError when it cannot be used here."""
    if not (folder / "preprocessor_config.json").is_file():
        return None
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, **_SAFE)
