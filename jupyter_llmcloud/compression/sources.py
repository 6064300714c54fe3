"""From what a user names to the folder of a model that generates text: a run's, or one in the Hugging Face layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jupyter_llmcloud.core.compression.methods import source_name
from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.core.serving.models.model_kind import GENERATOR
from jupyter_llmcloud.errors import ModelError, NotFound
from jupyter_llmcloud.storage.model_folder import ModelLayout, check_folder, model_kind
from jupyter_llmcloud.storage.runs import RunFolder, RunStore


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
    folder, run = _folder_of(target)
    layout = check_folder(
        folder, Path(base_model).expanduser().resolve() if base_model else None, is_own=run is not None
    )
    if layout.architecture is not None or model_kind(layout) != GENERATOR:
        what = "an architecture of a cell's own" if layout.architecture is not None else f"a {model_kind(layout)}"
        raise ModelError(
            f"{target} is {what}: what can be compressed and exported are language models of transformers."
        )
    name = source_name(target, folder.name if run is None else run.read().name)
    return SourceModel(name, layout, "" if run is None else run.run_id)


def _folder_of(target: str) -> tuple[Path, RunFolder | None]:
    missing = f"{target!r} is neither a run nor a folder."
    if NAME_PATTERN.fullmatch(target):
        try:
            run = RunStore().find(target)
        except NotFound as error:
            missing = str(error)
        else:
            return _saved_by(run), run
    folder = Path(target).expanduser()
    if not target or "\0" in target or not folder.is_dir():
        raise NotFound(f"{missing} Nor is there a folder {target!r}.")
    return folder.resolve(), None


def _saved_by(run: RunFolder) -> Path:
    record = run.read()
    saved = record.artifacts.get("model")
    folder = run.path / saved if saved else run.model
    if not folder.is_dir():
        ending = " It is still running." if record.is_active else ""
        raise ModelError(
            f"run {record.name!r} saved no model: add --save model,tokenizer to its %%distribute line.{ending}"
        )
    return folder.resolve()
