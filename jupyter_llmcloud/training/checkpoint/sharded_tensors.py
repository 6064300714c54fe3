"""Tensors that are spread over the ranks (FSDP): each rank saves its shard; on another world they are cut anew.

A shard is saved as the plain tensor that a rank holds, with the shape of the whole and how it was cut. On the same
world each rank gets its own back; on another one the shards of all ranks are put together and cut as the model is now.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed

_SHARD = "__llmcloud_shard__"
_CUT = re.compile(r"Shard\(dim=(\d+)\)|S\((\d+)\)")
_REPLICATED = ("Replicate()", "R")

Reference = Callable[[tuple[Any, ...]], Any]


def is_sharded(tensors: Any) -> bool:
    """Whether one of these tensors is spread over ranks."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def localize(value: Any) -> Any:
    """The same with every spread tensor as the shard of this rank."""
    if isinstance(value, DTensor):
        return {
            _SHARD: [str(placement) for placement in value.placements],
            "mesh": list(value.device_mesh.shape),
            "shape": list(value.shape),
            "local": value.to_local(),
        }
    if isinstance(value, dict):
        return type(value)((key, localize(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(localize(item) for item in value)
    return value


def is_shard(value: Any) -> bool:
    """Whether a saved value is a shard."""
    return isinstance(value, dict) and _SHARD in value


def cut_of(shard: dict[str, Any]) -> int | str | None:
    """The dimension along which a shard is cut; "whole" when every rank has all of it, None for anything else."""
    cuts = shard[_SHARD]
    if all(cut in _REPLICATED for cut in cuts):
        return "whole"
    cut = _CUT.fullmatch(cuts[0]) if len(cuts) == 1 else None
    return None if cut is None else int(cut[1] or cut[2])


def holds_shards(value: Any) -> bool:
    """Whether there is a shard in a saved state."""
    if is_shard(value):
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(holds_shards(item) for item in items)


def merge(states: list[Any]) -> Any:
    """The states of all ranks of a world as one, in which the shards are put together."""
    first = states[0]
    if is_shard(first):
        return {**first, "mesh": [1], "local": _whole(states)}
    if isinstance(first, dict):
        return type(first)((key, merge([state[key] for state in states])) for key in first)
    if type(first) in (list, tuple):
        return type(first)(merge([state[at] for state in states]) for at in range(len(first)))
    return first


def _whole(shards: list[Any]) -> torch.Tensor:
    cuts = shards[0][_SHARD]
    cut = _CUT.fullmatch(cuts[0]) if len(cuts) == 1 else None
    if cut is None:
        raise ResumeMissed(
            f"its tensors were spread as {', '.join(cuts)} over {len(shards)} ranks, which cannot be cut for another "
            f"number of ranks: resume it on {len(shards)}."
        )
    dim = int(cut[1] or cut[2])
    whole = torch.cat([shard["local"] for shard in shards], dim)
    assert list(whole.shape) == shards[0]["shape"]
    return whole


def spread(value: Any, reference: Reference, path: tuple[Any, ...] = ()) -> Any:
    """The inverse of `localize`: `reference(path)` is a tensor that is spread as this one is to be."""
    if is_shard(value):
        return _spread(value, reference(path), path)
    if isinstance(value, dict):
        return type(value)((key, spread(item, reference, (*path, key))) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(spread(item, reference, (*path, at)) for at, item in enumerate(value))
    return value


def spread_like(value: Any, tensor: torch.Tensor) -> Any:
    """The inverse of `localize` for one tensor, or None, that is to be spread like another."""
    return _spread(value, tensor, ()) if is_shard(value) else value


def _spread(shard: dict[str, Any], like: Any, path: tuple[Any, ...]) -> torch.Tensor:
    name, cuts = ".".join(map(str, path)), shard[_SHARD]
    if not isinstance(like, DTensor):
        raise ResumeMissed(
            f"{name} was spread over ranks ({', '.join(cuts)}), now it is not: wrap the model as before."
        )
    mesh, local = like.device_mesh, shard["local"].to(like.device)
    if shard["mesh"] == [1] and list(mesh.shape) != [1]:
        return distribute_tensor(local, mesh, like.placements, src_data_rank=None)
    now = [str(placement) for placement in like.placements]
    if (now, list(mesh.shape)) != (cuts, shard["mesh"]):
        raise ResumeMissed(
            f"{name} was spread as {', '.join(cuts)} over a mesh of {shard['mesh']} ranks, "
            f"now as {', '.join(now)} over {list(mesh.shape)}: wrap the model as before."
        )
    shape = torch.Size(shard["shape"])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=shape, stride=stride)
