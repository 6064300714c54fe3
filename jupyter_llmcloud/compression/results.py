"""What is made of a model is kept as a run of its own, whose record says what it was made of: served by its name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_llmcloud.compression.sources import SourceModel
from jupyter_llmcloud.core.compression.methods import CompressionMethod
from jupyter_llmcloud.core.names import run_id
from jupyter_llmcloud.protocol.compression import CompressRequest, Made
from jupyter_llmcloud.storage.runs import RunRecord, RunStore, nonce

ORIGIN = "compression.json"  # in the folder of the model
_NOT_COPIED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.onnx",
    "*.pte",
    "adapter_*",
    "architecture.*",  # of what a cell saved: of an adapter, the class that it has before it is merged
    "config.json",
    ORIGIN,
)
Write = Callable[[Path], str]


def keep(source: SourceModel, method: CompressionMethod, request: CompressRequest, write: Write) -> Made:
    """A run with the model that `write` puts into a folder; it returns a note on it. Half of one is removed again."""
    began = time.time()
    name = request.name or method.name_of(source.name)
    folder = RunStore().folder(run_id(name, began, nonce()))
    try:
        folder.model.mkdir(parents=True)
        _copy_small_files(source, folder.model)
        note = write(folder.model)
        origin = {"made_of": source.told, "method": method.text, "note": note, "created": began}
        (folder.model / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        folder.create(
            _record(folder.run_id, name, began, f"{method.text} of {source.told}: {note}", request), _text(request)
        )
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    return Made(method=method.text, run_id=folder.run_id, name=name, note=note)


def _record(ident: str, name: str, began: float, why: str, request: CompressRequest) -> RunRecord:
    now = time.time()
    return RunRecord(
        ident,
        name,
        state="finished",
        created=began,
        ended=now,
        owner=request.owner,
        history=[{"t": round(began, 3), "state": "running"}, {"t": round(now, 3), "state": "finished", "why": why}],
        artifacts={"model": "model"},
    )


def _text(request: CompressRequest) -> str:
    return (request.line or f"%compress {request.target}") + "\n"


def _copy_small_files(source: SourceModel, target: Path) -> None:
    """The tokenizer, the template of chats, how to sample: all but the weights and what describes them."""
    ignore = shutil.ignore_patterns(*_NOT_COPIED)
    for folder in dict.fromkeys((source.layout.folder, source.layout.tokenizer)):
        skipped = ignore(str(folder), [path.name for path in folder.iterdir()])
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in skipped:
                shutil.copyfile(path, target / path.name)


def origin_of(folder: Path) -> dict[str, Any]:
    """What a model was made of, and how; {} for one that was trained."""
    try:
        found: dict[str, Any] = json.loads((folder / ORIGIN).read_bytes())
        return found
    except (OSError, ValueError):
        return {}
