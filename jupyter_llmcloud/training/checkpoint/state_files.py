"""The states of models and optimizers that a rank saves of its own, in files of their own.

    rank-0001.model-1.safetensors     what rank 1 holds of the first such model; of shards, with how they were cut
    rank-0001.optimizer-1.state       what it holds of the first such optimizer that is not cut

Files of ranks that hold the same are the same, byte by byte: a checkpoint that is committed keeps one of them
(`storage.checkpoints`). Those of models can be put together without torch: `storage.models.sharded_weights` does that
for an endpoint that follows the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from jupyter_llmcloud.storage.checkpoints import file_of
from jupyter_llmcloud.storage.models.sharded_weights import SAME, SHARDS, TRAINED
from jupyter_llmcloud.training.checkpoint import sharded_tensors
from jupyter_llmcloud.training.checkpoint.serialization import load, save

_FILE = "file_of_rank"
_OF_OPTIMIZER = ("state", "loose")
_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}  # that every version of safetensors takes


def write(own: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Write the states in what a rank saves of its own in `path`; returns what is left, and the names of the files."""
    names: list[str] = []
    objects = {}
    for address, state in own["objects"].items():
        objects[address] = state
        if state["kind"] == "module":
            name = f"{path.stem}.model-{1 + sum('.model-' in other for other in names)}.safetensors"
            objects[address] = {**state, "state": _write_model(state, path.with_name(name)), _FILE: name}
        elif state["kind"] == "optimizer" and not sharded_tensors.holds_shards(state["state"]):
            name = f"{path.stem}.optimizer-{1 + sum('.optimizer-' in other for other in names)}.state"
            save({key: state[key] for key in _OF_OPTIMIZER}, path.with_name(name))
            objects[address] = {**state, **dict.fromkeys(_OF_OPTIMIZER), _FILE: name}
        else:
            continue
        names.append(name)
    return {**own, "objects": objects}, names


def _write_model(saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
    rest: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    cuts: dict[str, Any] = {}
    same: dict[str, str] = {}
    known: dict[Any, str] = {}
    for name, value in saved["state"].items():
        tensor = value["local"] if sharded_tensors.is_shard(value) else value
        if not (isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.dtype in _DTYPES):
            rest[name] = value
            continue
        if sharded_tensors.is_shard(value):
            cuts[name] = {"dim": sharded_tensors.cut_of(value), "shape": value["shape"]}
            rest[name] = {**value, "local": None}
        memory = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.numel() and (first := known.setdefault(memory, name)) != name:
            same[name] = first  # tied: one in memory, and one in the file
        else:
            tensors[name] = tensor
    about = {SHARDS: cuts, SAME: same, TRAINED: saved["parameters"]}
    _write_tensors(tensors, {"format": "pt", **{key: json.dumps(value) for key, value in about.items()}}, path)
    return rest


def _write_tensors(tensors: Mapping[str, torch.Tensor], about: dict[str, str], path: Path) -> None:
    """As safetensors' `save_file`, which writes what is said about them in another order each time."""
    header: dict[str, Any] = {"__metadata__": about}
    names, at = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)), 0  # so that each is aligned
    for name in names:
        value = tensors[name]
        place = [at, at + value.numel() * value.itemsize]
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": place}
        at = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def put_back(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a rank has saved of its own, with the states from their files."""
    for state in saved.get("objects", {}).values():
        if isinstance(state, dict) and _FILE in state:
            path = file_of(folder, state.pop(_FILE))
            if state["kind"] == "module":
                _put_back(state["state"], path)
            else:
                state.update(load(path))
    return saved


def _put_back(state: dict[str, Any], path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        same = json.loads(file.metadata()[SAME])
    for name, tensor in [*tensors.items(), *((name, tensors[first]) for name, first in same.items())]:
        if sharded_tensors.is_shard(state.get(name)):
            state[name]["local"] = tensor
        else:
            state[name] = tensor
