"""What the model in a folder is for: decided from its config files, before weights are read."""

from __future__ import annotations

import json
from typing import Any

from jupyter_llmcloud.core.serving.models.model_kind import ModelKind
from jupyter_llmcloud.storage.model_folder import ModelLayout, model_kind


def kind_of(layout: ModelLayout) -> ModelKind:
    """The kind of a model whose folder was checked.

    A name that tells nothing is looked up among the classes of the transformers that is installed: one that can
    generate is a generator, and no other one ever is.
    """
    kind = model_kind(layout)
    if kind != "unknown":
        return kind
    import transformers

    config = json.loads((layout.folder / "config.json").read_bytes())
    classes: list[Any] = [getattr(transformers, str(name), None) for name in config.get("architectures") or ()]
    if any(hasattr(known, "can_generate") and known.can_generate() for known in classes):
        return "generator"
    return "unknown"
