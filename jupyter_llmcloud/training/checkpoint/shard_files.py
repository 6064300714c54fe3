"""Shards of models in files of their own, as safetensors: a checkpoint of them can be put together without torch.

    rank-0001.model-1.safetensors     what rank 1 holds of the first spread model, with how each tensor was cut

`storage.models.sharded_weights` puts them together for an endpoint that follows the run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from jupyter_llmcloud.storage.models.sharded_weights import SAME, SHARDS
from jupyter_llmcloud.training.checkpoint import sharded_tensors

_FILE = "shard_file"


def write(own: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Write the shards in what a rank saves of its own in `path`; returns what is left, and the names of the files."""
    names: list[str] = []
    objects = {}
    for address, state in own["objects"].items():
        objects[address] = state
        if state["kind"] == "module" and sharded_tensors.holds_shards(state["state"]):
            name = f"{path.stem}.model-{len(names) + 1}.safetensors"
            objects[address] = {**state, "state": _write(state["state"], path.with_name(name)), _FILE: name}
            names.append(name)
    return {**own, "objects": objects}, names


def _write(state: dict[str, Any], path: Path) -> dict[str, Any]:
    rest: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    cuts: dict[str, Any] = {}
    same: dict[str, str] = {}
    known: dict[int, str] = {}
    for name, value in state.items():
        tensor = value["local"] if sharded_tensors.is_shard(value) else value
        if not isinstance(tensor, torch.Tensor):
            rest[name] = value
            continue
        if sharded_tensors.is_shard(value):
            cuts[name] = {"dim": sharded_tensors.cut_of(value), "shape": value["shape"]}
            rest[name] = {**value, "local": None}
        if tensor.numel() and (first := known.setdefault(tensor.data_ptr(), name)) != name:
            same[name] = first  # tied: one in memory, and one in the file
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, str(path), {"format": "pt", SHARDS: json.dumps(cuts), SAME: json.dumps(same)})
    return rest


def put_back(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a rank has saved of its own, with the shards from their files."""
    for state in saved.get("objects", {}).values():
        if isinstance(state, dict) and _FILE in state:
            _put_back(state["state"], folder / state.pop(_FILE))
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
