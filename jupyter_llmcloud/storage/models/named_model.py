"""From what a user names to the folder of a model: a run's, by its name or id, or one in the file system."""

from __future__ import annotations

import os
from pathlib import Path

from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.errors import ModelError, NotFound
from jupyter_llmcloud.storage.runs import RunFolder, RunStore


def named_model(target: str) -> tuple[Path, RunFolder | None]:
    """The folder of a model, and the run that has saved it; None for a folder. Raises NotFound or ModelError."""
    missing = f"{target!r} is neither a run nor a folder."
    if NAME_PATTERN.fullmatch(target):
        try:
            run = RunStore().find(target)
        except NotFound as error:
            missing = str(error)
        else:
            return _saved_by(run), run
    folder = Path(os.path.expanduser(target))
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
