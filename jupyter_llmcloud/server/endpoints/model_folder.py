"""From what a user names to the folder of a model that can be served, checked before anything is started."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.errors import ModelError, NotFound, UsageError
from jupyter_llmcloud.storage.runs import RunStore

MAX_HEADER = 100 << 20
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelFolder:
    """A folder in the Hugging Face layout; `revision` changes when its files do."""

    path: Path
    name: str
    revision: str


def resolve_target(target: str, runs: RunStore, root_dir: Path | None) -> ModelFolder:
    """The model of a run (its name or id), or of a folder; raises NotFound or ModelError."""
    if not target or "\0" in target:
        raise UsageError(f"target {target!r} is neither a run nor a folder.")
    if NAME_PATTERN.fullmatch(target):
        try:
            return _of_run(target, runs)
        except NotFound as error:
            not_a_run = str(error)
    else:
        not_a_run = f"{target!r} is not a folder, nor can a run have this name."
    path = Path(target).expanduser()
    path = path if path.is_absolute() else (root_dir or Path.cwd()) / path
    if not path.is_dir():
        raise NotFound(f"{not_a_run} Nor is there a folder {target!r}: a folder is best named by its whole path.")
    return check_folder(path.resolve(), path.name)


def _of_run(name: str, runs: RunStore) -> ModelFolder:
    folder = runs.find(name)
    record = folder.read()
    saved = record.artifacts.get("model")
    path = (folder.path / saved) if saved else folder.model
    if not path.is_dir():
        ending = " It is still running." if record.is_active else ""
        raise ModelError(
            f"run {record.name!r} saved no model: add --save model,tokenizer to its %%distribute line.{ending}"
        )
    return check_folder(path.resolve(), record.name)


def check_folder(path: Path, name: str) -> ModelFolder:
    """The folder, when everything that serving needs is in it; raises ModelError naming what is missing."""
    try:
        json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} has no config.json: it is not a model in the Hugging Face layout.") from None
    except ValueError as error:
        raise ModelError(f"{path}/config.json is not JSON ({error}).") from None
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickled = next((file.name for pattern in _PICKLES for file in path.glob(pattern)), None)
        hint = (
            f" {pickled} is not loaded, since a pickle can run code: save it anew with save_pretrained()."
            if pickled
            else ""
        )
        raise ModelError(f"{path} has no *.safetensors file with weights.{hint}")
    _check_shards(path)
    for file in weights:
        _check_header(file)
    if not any((path / file).exists() for file in _TOKENIZERS):
        raise ModelError(
            f"{path} has no tokenizer (tokenizer.json): save it beside the model (--save model,tokenizer)."
        )
    return ModelFolder(path, name, _revision(path))


def _check_shards(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        needed = set(json.loads(index.read_bytes())["weight_map"].values())
        missing = sorted(str(file) for file in needed if not (path / str(file)).exists())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is not an index of weights.") from None
    if missing:
        raise ModelError(f"{path} lacks {len(missing)} of its weight files, the first is {missing[0]}.")


def _check_header(file: Path) -> None:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
    if not 2 <= size <= min(MAX_HEADER, file.stat().st_size - 8):
        raise ModelError(f"{file} is not a safetensors file, or was cut off.")


def _revision(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        stat = file.stat()
        digest.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns};".encode())
    return digest.hexdigest()[:12]
