"""Fingerprints of the tensors that ranks must hold alike, taken at a checkpoint where the tensors are.

Each is a sum of the bits, weighted by row, modulo 2**64: one pass over the memory, on the device, without a copy of the
model. It finds what came apart by mistake; it is no protection against forgery.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from jupyter_llmcloud.training.checkpoint import rng
from jupyter_llmcloud.training.parallel.plans import replicas_of, trains_apart
from jupyter_llmcloud.training.parallel.unwrap import unwrapped

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_REPLICAS = "replicate"  # the dimension of a mesh along which ranks hold the same


def of_models(models: list[torch.nn.Module]) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of the parameters, and of the buffers, that other ranks hold as well: by name, in the models' order.

    Left out are models that only this rank is known to have, those that ranks train apart for now, those that are alike
    on a part of the ranks (a group of the cell's own), and what DistributedDataParallel was told to ignore.
    """
    parameters, buffers = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for number, model in enumerate(models):
        prefix = f"{type(unwrapped(model)).__name__} {number + 1}: " if len(models) > 1 else ""
        wrapper = None if trains_apart(model) else replicas_of(model)
        ignored = set(getattr(wrapper, "parameters_to_ignore", ()))
        plain = unwrapped(model)
        for name, tensor in plain.named_parameters():
            if (wrapper is not None and name not in ignored) or _is_replicated(tensor):
                parameters[prefix + name + _part(tensor)] = _local(tensor)
        if wrapper is not None or _is_sharded_over_all(plain):
            buffers |= {prefix + name: value for name, value in plain.named_buffers() if name not in ignored}
    return _digests(parameters), _digests(buffers)


def of_rng() -> dict[str, str]:
    """Digests of this rank's random number generators."""
    return {name: f"{zlib.crc32(repr(_plain(state)).encode()):08x}" for name, state in rng.snapshot().items()}


def _is_sharded_over_all(model: torch.nn.Module) -> bool:
    """Whether all ranks have a part of each layer: what is no parameter each of them has as a whole."""
    meshes = {each.device_mesh for each in model.parameters() if isinstance(each, DTensor)}
    return bool(meshes) and all(mesh.size() == dist.get_world_size() for mesh in meshes)


def _is_replicated(tensor: torch.Tensor) -> bool:
    if not isinstance(tensor, DTensor):
        return False
    placed = zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=False)
    return any(name == _REPLICAS and isinstance(placement, Replicate) for name, placement in placed)


def _part(tensor: torch.Tensor) -> str:
    """Which shard of the tensor it is: ranks with the same one are replicas of each other."""
    if not isinstance(tensor, DTensor):
        return ""
    coordinate = tensor.device_mesh.get_coordinate() or ()
    names = tensor.device_mesh.mesh_dim_names or ()
    shards = [str(at) for name, at in zip(names, coordinate, strict=True) if name != _REPLICAS]
    return f" (shard {','.join(shards)})"


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    with torch.no_grad():
        sums = {name: _bits(value.detach()) for name, value in tensors.items() if not value.is_meta}
        by_device: dict[torch.device, list[str]] = {}
        for name, value in sums.items():
            by_device.setdefault(value.device, []).append(name)
        found: dict[str, str] = {}
        for names in by_device.values():  # one wait for each device, not for each tensor
            numbers = torch.stack([sums[name] for name in names]).tolist()
            found |= {name: f"{number % (1 << 64):016x}" for name, number in zip(names, numbers, strict=True)}
    return {name: found[name] for name in sums}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    rows = tensor.contiguous().reshape(tensor.shape[0] if tensor.dim() else 1, -1)
    bits = rows.view(_INTEGERS[rows.element_size()])
    sums = bits.sum(1, dtype=torch.int64)
    return (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum()


def _plain(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return zlib.crc32(state.cpu().numpy().tobytes())
    if isinstance(state, tuple):
        return tuple(_plain(item) for item in state)
    return state.tobytes() if hasattr(state, "tobytes") else state
