"""Meshes that outlive their process groups; the groups are torch's fake ones, which send nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from jupyter_llmcloud.training.parallel.mesh import Meshes

DIMENSIONS = {"dp": 2, "tp": 2}
CPU = torch.device("cpu")


@pytest.fixture
def new_group() -> Iterator[Callable[[], None]]:
    """Leave the process group, if there is one, and join another, whose groups have no name that was there before."""
    count = 0

    def renew() -> None:
        nonlocal count
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
        for group in [dist.new_group([0, 1]) for _ in range(10 * count)]:
            dist.destroy_process_group(group)
        count += 1

    renew()
    yield renew
    dist.destroy_process_group()


def works(mesh: DeviceMesh) -> bool:
    """Whether each of its dimensions has a group of the present process group."""
    return all(dist.get_world_size(mesh.get_group(name)) == 2 for name in mesh.mesh_dim_names or ())


def test_a_mesh_its_parts_and_their_copies_have_new_groups(new_group: Callable[[], None]) -> None:
    meshes = Meshes()
    mesh = meshes.get(DIMENSIONS, CPU)
    every = [mesh, mesh["tp"], mesh["dp"], copy.deepcopy(mesh["tp"])]
    assert all(map(works, every))
    new_group()
    with pytest.raises(Exception, match="group"):
        works(mesh)
    meshes.renew()
    assert all(map(works, every))


def test_a_mesh_of_before_another_size_of_the_world_has_new_groups_each_time(new_group: Callable[[], None]) -> None:
    meshes = Meshes()
    former = meshes.get(DIMENSIONS, CPU)["tp"]
    new_group()
    meshes.forget()
    present = meshes.get(DIMENSIONS, CPU)
    assert works(former)
    new_group()
    meshes.renew()
    assert works(former) and works(present)
    meshes.get({"tp": 4}, CPU)  # another mesh of the same ranks
    assert works(former) and works(present)


def test_parts_of_the_same_name_over_other_ranks_keep_to_their_own_groups(new_group: Callable[[], None]) -> None:
    meshes = Meshes()
    inner = meshes.get({"dp": 2, "shard": 2}, CPU)["shard"]
    outer = meshes.get({"shard": 2, "tp": 2}, CPU)["shard"]
    for _ in range(2):
        assert [dist.get_process_group_ranks(mesh.get_group()) for mesh in (inner, outer)] == [[0, 1], [0, 2]]
        new_group()
        meshes.renew()
