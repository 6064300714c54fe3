"""From what a user names to the folder of a model that generates text: a run's, or one in the Hugging Face layout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from jupyter_llmcloud.core.compression.methods import source_name
from jupyter_llmcloud.core.serving.models.model_kind import GENERATOR
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.storage.model_folder import ModelLayout, check_folder, model_kind
from jupyter_llmcloud.storage.models.named_model import named_model


@dataclass(frozen=True)
class SourceModel:
    """A model that something is made of.

    Attributes:
        name: what results are called after.
        run_id: of the run that saved it; "" for a folder.
    """

    name: str
    layout: ModelLayout
    run_id: str = ""

    @property
    def folder(self) -> Path:
        """What was named: of an adapter, the adapter's."""
        return self.layout.adapter or self.layout.folder

    @property
    def told(self) -> str:
        """It in words, for the record of a result."""
        return f"run {self.run_id}" if self.run_id else str(self.folder)

    @property
    def num_bytes(self) -> int:
        """What the weights of all of its parts take on disk."""
        folders = [self.layout.folder, *([self.layout.adapter] if self.layout.adapter else [])]
        return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))


def find_source(target: str, base_model: str = "") -> SourceModel:
    """The model that `target` names. Raises NotFound or ModelError."""
    folder, run = named_model(target)
    layout = check_folder(
        folder, Path(os.path.expanduser(base_model)).resolve() if base_model else None, is_own=run is not None
    )
    if layout.architecture is not None or model_kind(layout) != GENERATOR:
        kind = model_kind(layout)
        article = "an" if kind[0] in "aeio" else "a"
        what = "an architecture of a cell's own" if layout.architecture is not None else f"{article} {kind}"
        raise ModelError(
            f"{target} is {what}: what can be compressed and exported are language models of transformers."
        )
    name = source_name(target, folder.name if run is None else run.read().name)
    return SourceModel(name, layout, "" if run is None else run.run_id)
