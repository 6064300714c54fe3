"""Device meshes of this rank, which outlive their process groups.

Spread tensors and FSDP's bookkeeping hold the mesh they were made on, and a mesh holds its groups by name. When the
group of the world is renewed, groups of these names are made again (`group.renewed`), or else new ones for the same
dimensions are put into the same mesh objects.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from jupyter_llmcloud.training.group.process_group import watched_sockets


class Meshes:
    """Those that this package has made, by their dimensions; every rank makes the same ones in the same order."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}

    def get(self, dimensions: Mapping[str, int], device: torch.device) -> DeviceMesh:
        """The mesh with these dimensions over all ranks; made when it is asked for first. All ranks must ask."""
        key = tuple(dimensions.items())
        if key not in self._made:
            self._made[key] = self._make(key, device.type)
            _adopt_all(self._made[key])
        return self._made[key]

    def dimensions(self) -> list[Any]:
        """Of those that were made, in order."""
        return list(self._made)

    def forget(self) -> None:
        """The world has another size."""
        self._made.clear()

    def renew(self) -> None:
        """New groups for every mesh that was not given them yet (see `group.renewed`). All ranks must call it alike."""
        for key, mesh in self._made.items():
            if not has_groups(mesh):
                _adopt_all(self._make(key, mesh.device_type))
        renew_fsdp()

    @staticmethod
    def _make(key: tuple[tuple[str, int], ...], device_type: str) -> DeviceMesh:
        names, sizes = zip(*key, strict=True)
        with watched_sockets():
            return init_device_mesh(device_type, sizes, mesh_dim_names=names)


MESHES = Meshes()


def _all() -> list[DeviceMesh]:
    """Every mesh of this process: torch keeps some that no model has, where it remembers how it has cut for them."""
    return [value for value in gc.get_objects() if type(value) is DeviceMesh]


def _adopt_all(fresh: DeviceMesh) -> None:
    """Every mesh that is like one that was made anew, and every part of such a mesh, gets its groups.

    They are told by what they are: beside those that were made here there are copies of them, and former ones, wherever
    torch and the user's objects keep tensors that were spread on them.
    """
    for mesh in _all():
        if mesh._get_root_mesh() is not fresh and _is_part_of(mesh, fresh):
            _adopt(mesh, fresh)


def _is_part_of(mesh: DeviceMesh, whole: DeviceMesh) -> bool:
    """Whether it has the ranks and some of the dimensions of another one, by their names and who stands along them.

    Names and sizes alone do not tell: `shard` is the inner dimension of one plan's mesh and the outer one of another's.
    """
    if mesh.device_type != whole.device_type or mesh._get_root_mesh().size() != whole.size():
        return False
    own, other = _ranks_along(mesh), _ranks_along(whole)
    return bool(own) and all(other.get(name) == ranks for name, ranks in own.items())


def _ranks_along(mesh: DeviceMesh) -> dict[str, list[int]]:
    """The ranks of the group of this one along each dimension."""
    place = mesh.get_coordinate()
    if place is None:
        return {}
    lines: dict[str, list[int]] = {}
    for at, name in enumerate(mesh.mesh_dim_names or ()):
        line: list[int | slice] = [*place]
        line[at] = slice(None)
        lines[name] = mesh.mesh[tuple(line)].tolist()
    return lines


def _adopt(mesh: DeviceMesh, fresh: DeviceMesh) -> None:
    """Give a mesh, or a part of it, the groups of one that was made anew."""
    names: Any = fresh.mesh_dim_names
    groups = dict(zip(names, fresh._dim_group_names, strict=True))
    mesh._dim_group_names = [groups[name] for name in mesh.mesh_dim_names or ()]


def has_groups(mesh: DeviceMesh) -> bool:
    """Whether each of its dimensions has a group of the present process group."""
    try:
        return all(c10d._resolve_process_group(name) is not None for name in mesh._dim_group_names)
    except (LookupError, RuntimeError, ValueError):
        return False


def _fsdp_groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    return list(several if several is not None else filter(None, [state._fsdp_param_group]))


def _mesh_infos(group: Any) -> list[Any]:
    holders = [group, *group.fsdp_params]
    infos = [getattr(holder, name, None) for holder in holders for name in ("mesh_info", "post_forward_mesh_info")]
    return list({id(info): info for info in infos if info is not None}.values())


def renew_fsdp() -> None:
    """What FSDP keeps of its groups, and of a step that was broken off, is as when the modules were wrapped."""
    for module in [value for value in gc.get_objects() if issubclass(type(value), FSDPModule)]:
        infos = [info for group in _fsdp_groups(module) for info in _mesh_infos(group)]
        if all(has_groups(info.mesh) for info in infos):
            _renew_module(module, infos)


def _renew_module(module: FSDPModule, infos: list[Any]) -> None:
    for info in infos:
        info.__post_init__()
    for group in _fsdp_groups(module):
        group._all_gather_result = None  # its collective has ended with the old group
        group._partial_reduce_output = None
        group._post_forward_indices.clear()
        group._training_state = type(group._training_state).IDLE
        group._to_sharded()
    state: Any = module._get_fsdp_state()
    state._training_state = type(state._training_state).IDLE
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False
    if hasattr(state._comm_ctx, "post_forward_order"):  # made by the first forward
        state._comm_ctx.all_gather_state = None
        state._comm_ctx.post_forward_order.clear()
    if (pending := getattr(state._comm_ctx, "reduce_scatter_states", None)) is not None:
        pending.clear()
    else:
        state._comm_ctx.reduce_scatter_state = None  # of older versions
