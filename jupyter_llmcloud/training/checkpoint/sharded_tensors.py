"""Tensors that are spread over the ranks (FSDP): each rank saves its shard; on another world they are cut anew.

A shard is saved as the plain tensor that a rank holds, with the shape of the whole and how it was cut. On the same
world each rank gets its own back; on another one the shards of all ranks are put together and cut as the model is now.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed

_SHARD = "__llmcloud_shard__"
_CUT = re.compile(r"Shard\(dim=(\d+)\)|S\((\d+)\)|_StridedShard\(dim=(\d+), sf=\d+\)|_S\((\d+), \d+\)")
_COPIES = ("Replicate()", "R")
_REPLICATED = -1

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
            "ranks": value.device_mesh.mesh.flatten().tolist(),
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
    cuts = [_dimension(cut) for cut in shard[_SHARD]]
    if all(cut == _REPLICATED for cut in cuts):
        return "whole"
    return cuts[0] if len(cuts) == 1 else None


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
        return {**first, "mesh": [1], "ranks": [0], "local": _whole(states)}
    if isinstance(first, dict):
        return type(first)((key, merge([state[key] for state in states])) for key in first)
    if type(first) in (list, tuple):
        return type(first)(merge([state[at] for state in states]) for at in range(len(first)))
    return first


def _whole(shards: list[Any]) -> torch.Tensor:
    cuts: list[Any]
    cuts, mesh = [_dimension(cut) for cut in shards[0][_SHARD]], shards[0]["mesh"]
    num_ranks, ranks = len(shards), shards[0].get("ranks", range(len(shards)))
    if None not in cuts and max(ranks) < num_ranks:
        shards = [shards[rank] for rank in ranks]  # others have the same, over a mesh of their own
    if None in cuts or len(cuts) != len(mesh) or math.prod(mesh) != len(shards):
        raise ResumeMissed(
            f"its tensors were spread as {', '.join(shards[0][_SHARD])} over a mesh of {mesh} of {num_ranks} ranks, "
            f"which cannot be cut in another way: resume it on {num_ranks} ranks with the same plan."
        )
    pieces = dict(zip(itertools.product(*map(range, mesh)), (shard["local"] for shard in shards), strict=True))
    for dim in reversed(_order_of_cuts(shards[0][_SHARD])):
        rows: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for at in sorted(pieces):
            rows.setdefault((*at[:dim], 0, *at[dim + 1 :]), []).append(pieces[at])
        cut = cuts[dim]
        pieces = {at: row[0] if cut == _REPLICATED else torch.cat(row, cut) for at, row in rows.items()}
    (whole,) = pieces.values()
    assert list(whole.shape) == shards[0]["shape"]
    return whole


def _dimension(placement: str) -> int | None:
    """The dimension that is cut; -1 for a copy on each rank, None for what cannot be put together."""
    if placement in _COPIES:
        return _REPLICATED
    cut = _CUT.fullmatch(placement)
    return int(next(filter(None, cut.groups()))) if cut is not None else None


def _order_of_cuts(placements: list[str]) -> list[int]:
    """In which order the dimensions of a mesh have cut: those that cut what another had cut before come last."""
    late = [at for at, placement in enumerate(placements) if placement.startswith("_S")]
    return [at for at in range(len(placements)) if at not in late] + late[::-1]


def spread(value: Any, reference: Reference, path: tuple[Any, ...] = ()) -> Any:
    """The inverse of `localize`: `reference(path)` is a tensor that is spread as this one is to be.

    What was saved whole is cut where the reference is, and what was put together is left whole where it is not.
    """
    if is_shard(value):
        return _spread(value, reference(path), path)
    if isinstance(value, dict):
        return type(value)((key, spread(item, reference, (*path, key))) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(spread(item, reference, (*path, at)) for at, item in enumerate(value))
    if isinstance(value, torch.Tensor):
        like = reference(path)
        if isinstance(like, DTensor) and value.shape == like.shape:
            return _cut(value, like)
    return value


def spread_like(value: Any, tensor: torch.Tensor) -> Any:
    """The inverse of `localize` for one tensor, or None, that is to be spread like another."""
    return spread(value, lambda _: tensor)


def _spread(shard: dict[str, Any], like: Any, path: tuple[Any, ...]) -> torch.Tensor:
    name, cuts = ".".join(map(str, path)), shard[_SHARD]
    is_whole = shard["mesh"] == [1]
    if not isinstance(like, DTensor):
        if is_whole:
            whole: torch.Tensor = shard["local"]
            return whole
        raise ResumeMissed(
            f"{name} was spread over ranks ({', '.join(cuts)}), now it is not: wrap the model as before."
        )
    mesh, local = like.device_mesh, shard["local"].to(like.device)
    if is_whole and list(mesh.shape) != [1]:
        return _cut(local, like)
    now = [str(placement) for placement in like.placements]
    if not is_whole and (now, list(mesh.shape)) != (cuts, shard["mesh"]):
        raise ResumeMissed(
            f"{name} was spread as {', '.join(cuts)} over a mesh of {shard['mesh']} ranks, "
            f"now as {', '.join(now)} over {list(mesh.shape)}: wrap the model as before."
        )
    return _of_local(local, like)


def _cut(whole: torch.Tensor, like: DTensor) -> DTensor:
    """The shard of this rank, cut without any communication."""
    mesh, local = like.device_mesh, whole.to(like.device)
    names = [str(placement) for placement in like.placements]
    here = mesh.get_coordinate()
    assert here is not None
    for dim in _order_of_cuts(names):
        cut = _dimension(names[dim])
        if cut is None:
            raise ResumeMissed(f"a tensor that is spread as {', '.join(names)} cannot be cut from a whole one.")
        if cut != _REPLICATED:
            pieces = torch.chunk(local, mesh.size(dim), cut)
            local = pieces[here[dim]] if here[dim] < len(pieces) else local.narrow(cut, 0, 0)
    return _of_local(local.contiguous(), like)


def _of_local(local: torch.Tensor, like: DTensor) -> DTensor:
    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
    )
