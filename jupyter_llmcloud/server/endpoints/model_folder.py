"""From what a user names to the folder of a model that can be served, checked before anything is started."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.core.serving.models.model_kind import GENERATOR
from jupyter_llmcloud.errors import ModelError, NotFound, UsageError
from jupyter_llmcloud.storage.model_folder import ADAPTER, ModelLayout, check_folder, model_kind
from jupyter_llmcloud.storage.models import served_code
from jupyter_llmcloud.storage.models.gguf import gguf_file
from jupyter_llmcloud.storage.runs import RunStore


@dataclass(frozen=True)
class ModelFolder:
    """A folder in the Hugging Face layout.

    Attributes:
        revision: changes when its files do.
        base_model: of an adapter, the folder of the model that it belongs to.
        kind: what the model is for, as far as its config files tell.
        source: a file with the user's own code: the architecture of a run's model, a cell or an object.
    """

    path: Path
    name: str
    revision: str
    base_model: str = ""
    kind: str = ""
    source: str = ""


def of_code(file: Path, name: str) -> ModelFolder:
    """Code that is served by itself, kept by `storage.models.served_code`."""
    return ModelFolder(file.parent, name, served_code.fingerprint(file), kind="python", source=str(file))


def resolve_target(target: str, runs: RunStore, root_dir: Path | None, base_model: str | None = None) -> ModelFolder:
    """The model of a run (its name or id), or of a folder; raises NotFound or ModelError.

    Args:
        target: what the user named.
        runs: where runs are looked for.
        root_dir: what a relative path is relative to.
        base_model: the folder of an adapter's base model, when it is not the one that the adapter names.
    """
    base = None if base_model is None else _absolute(base_model, root_dir)
    if not target or "\0" in target or "\0" in (base_model or ""):
        raise UsageError(f"target {target!r} is neither a run nor a folder.")
    if NAME_PATTERN.fullmatch(target):
        try:
            return _of_run(target, runs, base)
        except NotFound as error:
            missing = f"{error} Nor is there a folder {target!r}"
    else:
        missing = f"there is no folder {target!r}"
    path = _absolute(target, root_dir)
    if not path.is_dir():
        raise NotFound(f"{missing}{'' if os.path.isabs(target) else ': a folder is best named by its whole path'}.")
    return _checked(path, path.name, base)


def of_followed_run(path: Path) -> ModelFolder:
    """A model that was made of a checkpoint of a run of the user's own, or that such a run has saved."""
    return _checked(path, path.name, None, is_own=True)


def resolve_adapter(target: str, runs: RunStore, root_dir: Path | None, serves: Revision) -> ModelFolder:
    """The adapter of a run, or in a folder, for the model that is served; raises NotFound or ModelError."""
    base = serves.base_model or serves.model
    path = _absolute(target, root_dir)
    if not path.is_dir() and NAME_PATTERN.fullmatch(target):
        folder = runs.find(target)
        saved = folder.read().artifacts.get("model")
        path, name = (folder.path / saved if saved else folder.model), target
    else:
        name = path.name
    if not (path / ADAPTER).is_file():
        raise ModelError(f"{target!r} holds no adapter of PEFT ({ADAPTER}): serve a whole model under its own name.")
    return _checked(path, name, Path(base))


def resolve_gguf(target: str, runs: RunStore, root_dir: Path | None) -> ModelFolder:
    """A model in the format of llama.cpp: a GGUF file, a folder with one, or a run that has exported one."""
    if NAME_PATTERN.fullmatch(target):
        try:
            folder = runs.find(target)
            path = folder.path / (folder.read().artifacts.get("model") or folder.model.name)
        except NotFound:
            path = _absolute(target, root_dir)
    else:
        path = _absolute(target, root_dir)
    if not target or "\0" in target or not path.exists():
        raise NotFound(f"there is no GGUF file or folder {target[:256]!r}: it is best named by its whole path.")
    file = gguf_file(path.resolve())
    stat = file.stat()
    digest = hashlib.sha256(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return ModelFolder(file, _as_name(file.stem), digest, kind=GENERATOR)


def model_elsewhere(target: str, url: str) -> ModelFolder:
    """A model of a server elsewhere, by the name that it has there. The endpoint is named after the last part of it."""
    if not target or not target.isprintable() or len(target) > 256:
        raise UsageError(f"{target[:256]!r} is no name of a model: with --engine URL give the model's name there.")
    digest = hashlib.sha256(f"{url} {target}".encode()).hexdigest()[:12]
    return ModelFolder(Path(target), _as_name(target), digest, kind=GENERATOR)


def _as_name(text: str) -> str:
    """A name of an endpoint like a model's: `org/model:7b` is `model-7b`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text.rpartition("/")[2]).strip("-._")[:64] or "model"


def _absolute(path: str, root_dir: Path | None) -> Path:
    given = Path(os.path.expanduser(path))
    return given if given.is_absolute() else (root_dir or Path.cwd()) / given


def _of_run(name: str, runs: RunStore, base_model: Path | None) -> ModelFolder:
    folder = runs.find(name)
    record = folder.read()
    saved = record.artifacts.get("model")
    path = (folder.path / saved) if saved else folder.model
    if not path.is_dir():
        ending = " It is still running." if record.is_active else ""
        raise ModelError(
            f"run {record.name!r} saved no model: add --save model,tokenizer to its %%distribute line.{ending}"
        )
    return _checked(path, record.name, base_model, is_own=True)


def _checked(path: Path, name: str, base_model: Path | None, *, is_own: bool = False) -> ModelFolder:
    layout = check_folder(path.resolve(), None if base_model is None else base_model.resolve(), is_own=is_own)
    base = "" if layout.adapter is None else str(layout.folder)
    source = "" if layout.architecture is None else str(layout.architecture)
    return ModelFolder(path.resolve(), name, _revision(layout), base, model_kind(layout), source)


def _revision(layout: ModelLayout) -> str:
    digest = hashlib.sha256()
    for folder in layout.folders:
        for file in sorted(folder.iterdir()):
            stat = file.stat()
            digest.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns};".encode())
    return digest.hexdigest()[:12]
