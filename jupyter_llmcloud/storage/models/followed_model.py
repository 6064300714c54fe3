"""A model folder made of the newest checkpoint of a run: its weights, beside what the run has written for serving.

<run>/serving/            config.json, the tokenizer, weights.json (names and shapes of the model's tensors)
<run>/served/step-40/     a whole model: the files above, and the weights of the checkpoint of step 40
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.storage.checkpoints import Checkpoint
from jupyter_llmcloud.storage.models import sharded_weights
from jupyter_llmcloud.system.atomic_files import publish_folder

SERVING = "serving"
SERVED = "served"
WEIGHTS = "weights.json"
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def make(run: Path, checkpoint: Checkpoint) -> Path:
    """The folder with the model of a checkpoint, made when it is not there. Raises ModelError when that cannot be."""
    target = run / SERVED / f"step-{checkpoint.step}"
    if target.is_dir():
        return target
    files = run / SERVING
    try:
        wanted = json.loads((files / WEIGHTS).read_bytes())
    except OSError:
        raise ModelError(
            "its checkpoints hold no model that can be served: start it with --save model,tokenizer, and make both in "
            "variables of the cell before it trains."
        ) from None
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(files, staging, ignore=shutil.ignore_patterns(WEIGHTS))
    try:
        _write_weights(checkpoint, wanted, staging / "model.safetensors")
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    publish_folder(staging, target, durable=False)
    return target


def retain(run: Path, keep: set[Path]) -> None:
    """Delete the folders that nobody serves any more."""
    folder = run / SERVED
    if folder.is_dir():
        for path in folder.iterdir():
            if path not in keep:
                shutil.rmtree(path, ignore_errors=True)


def _write_weights(checkpoint: Checkpoint, wanted: dict[str, list[int] | None], target: Path) -> None:
    """The weights of the model in a checkpoint: one file of it, or put together of what its ranks have written."""
    shapes = {name: shape for name, shape in wanted.items() if shape is not None}
    if len(shapes) == len(wanted):
        of_all = sorted(checkpoint.path.glob("model*.safetensors"))
        for path in [*of_all, *sharded_weights.alike(checkpoint)]:
            header = _header(path)[1]
            names = {name: _plain(name) for name in header if name != "__metadata__"}
            found = {plain: header[name]["shape"] for name, plain in names.items()}
            if all(found.get(name) == shape for name, shape in shapes.items()):
                _link_or_rename(path, target, names)
                return
        if sharded_weights.write_whole(checkpoint, shapes, _plain, target):
            return
    raise ModelError(
        f"the checkpoint of step {checkpoint.step} does not hold the whole model, once for all ranks: one of which "
        "they hold different values, since it is trained by each rank for itself, or that FullyShardedDataParallel has "
        "wrapped, can be served when the run has ended (one of fully_shard, which is fsdp_version=2, can be followed)."
    )


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
    return name


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what is said of them."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return 8 + length, header


def _link_or_rename(source: Path, target: Path, names: dict[str, str]) -> None:
    """The same file where the names fit (it outlives its checkpoint then), else a copy with other names."""
    begin, header = _header(source)
    is_plain = all(name == plain for name, plain in names.items())
    if is_plain and header.get("__metadata__", {}).get("format") == "pt":
        try:
            os.link(source, target)
            return
        except OSError:  # another file system
            shutil.copyfile(source, target)
            return
    renamed = {names.get(name, name): row for name, row in header.items()}
    renamed["__metadata__"] = {**header.get("__metadata__", {}), "format": "pt"}
    text = json.dumps(renamed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as reading, target.open("wb") as writing:
        reading.seek(begin)
        writing.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(reading, writing, 1 << 20)
