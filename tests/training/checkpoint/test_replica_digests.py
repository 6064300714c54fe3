"""A digest changes with any bit of a tensor and with the order of its rows, and with nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from jupyter_llmcloud.training.checkpoint import replica_digests
from jupyter_llmcloud.training.checkpoint.replica_digests import _digests


def digest(tensor: torch.Tensor) -> str:
    return _digests({"t": tensor})["t"]


TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
TYPES += [torch.complex64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4)])
def test_one_element_of_any_type_changes_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    changed = tensor.clone()
    changed.view(-1)[-1] = 0
    assert digest(tensor) == digest(tensor.clone()) != digest(changed)


def test_the_last_bit_and_the_sign_of_zero_count_and_strides_do_not() -> None:
    tensor = torch.randn(4, 6)
    assert digest(tensor) == digest(tensor.t().contiguous().t())
    next_to_it = tensor.clone()
    next_to_it[2, 3] = torch.nextafter(tensor[2, 3], torch.tensor(9.0))
    assert digest(next_to_it) != digest(tensor)
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def test_rows_in_another_order_are_another_tensor() -> None:
    tensor = torch.randn(4, 6)
    assert digest(tensor.flip(0)) != digest(tensor)


def test_an_empty_tensor_has_one() -> None:
    assert digest(torch.zeros(0, 3)) == digest(torch.zeros(0, 3))


def test_a_model_that_nothing_has_spread_is_not_compared() -> None:
    assert replica_digests.of_models([torch.nn.Linear(2, 2)]) == ({}, {})


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """Of which the other one does nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("num_ranks", "names"), [(2, {"running_mean", "running_var", "num_batches_tracked"}), (1, set())]
)
def test_buffers_of_a_model_that_is_sharded_over_all_ranks_are_compared(num_ranks: int, names: set[str]) -> None:
    model = torch.nn.BatchNorm1d(4)
    fully_shard(model, mesh=DeviceMesh("cpu", list(range(num_ranks)), mesh_dim_names=("shard",)))
    parameters, buffers = replica_digests.of_models([model])
    assert parameters == {} and set(buffers) == names


def test_each_generator_has_its_own() -> None:
    before = replica_digests.of_rng()
    assert before == replica_digests.of_rng()
    random.random()
    after = replica_digests.of_rng()
    assert {name for name in before if before[name] != after[name]} == {"python"}
