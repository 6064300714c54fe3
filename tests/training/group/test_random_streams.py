"""`--seed`: what is made before training is alike on every rank, what is drawn while it trains is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.resuming import cell, results, resumed, same
from tests.support.worlds import Ranks

MODEL = """
import random, torch, numpy as np
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
weights = [p.tolist() for p in model.parameters()]
first, second = random_split(range(20), [10, 10])
split = [list(first.indices), torch.randperm(5).tolist(), random.random(), np.random.rand()]
"""
TRAIN = """
model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
masks = [(model.module[1](torch.ones(64)) > 0).tolist() for _ in range(2)]
drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
order = [batch.tolist() for batch in DataLoader(torch.arange(12), batch_size=3, shuffle=True)]
"""
WORKERS = """
class Augmented(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.rand(1).item(), random.random(), np.random.rand()
def seen(**more):
    return [row for batch in DataLoader(Augmented(), batch_size=1, num_workers=2, **more) for row in zip(*batch)]
augmented = [seen(), seen(shuffle=True), seen(generator=torch.Generator().manual_seed(3))]
augmented = [[[float(value) for value in row] for row in rows] for rows in augmented]
"""


def both(world: Ranks, name: str) -> tuple[Any, Any]:
    return world.pull(name, 0), world.pull(name, 1)


def test_initial_weights_and_splits_are_alike_and_what_training_draws_is_not(world: Ranks) -> None:
    world.ok(MODEL + TRAIN, seed=3)
    for name in ("weights", "split", "order"):
        one, other = both(world, name)
        assert one == other, name
    masks, others = both(world, "masks")
    assert all(mask != other for mask, other in zip(masks, others, strict=True))
    drawn, elsewhere = both(world, "drawn")
    assert all(one != other for one, other in zip(drawn, elsewhere, strict=True))


def test_without_a_wrapper_ranks_part_at_the_first_step_of_an_optimizer(world: Ranks) -> None:
    world.ok(
        MODEL
        + """
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = torch.rand(1).item()
model(torch.ones(8)).sum().backward()
optimizer.step()
after = torch.rand(1).item(), torch.initial_seed()
""",
        seed=3,
    )
    one, other = both(world, "before")
    assert one == other
    (one, seed), (other, its_seed) = both(world, "after")
    assert one != other
    assert seed == its_seed == 3


def test_augmentation_differs_over_ranks_and_workers(world: Ranks) -> None:
    world.ok(MODEL + WORKERS, seed=3)
    for rows, others in zip(*both(world, "augmented"), strict=True):
        drawn = [value for row in [*rows, *others] for value in row]
        assert len(drawn) == 48
        assert len(set(drawn)) == 48


def test_the_same_seed_gives_the_same_run(world: Ranks) -> None:
    def run(seed: int) -> list[Any]:
        world.ok(MODEL + TRAIN + WORKERS, seed=seed)
        return [both(world, name) for name in ("weights", "split", "masks", "drawn", "order", "augmented")]

    assert run(3) == run(3)
    assert all(one != other for one, other in zip(run(3), run(4), strict=True))


def test_a_prepared_loader_takes_every_sample_once(world: Ranks) -> None:
    world.ok(
        MODEL
        + """
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
samples = []
for seedable in (False, True):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable))
    net, loader = accelerator.prepare(model, DataLoader(TensorDataset(torch.arange(32)), batch_size=4, shuffle=True))
    samples.append([[int(i) for batch, in loader for i in batch] for epoch in range(2)])
""",
        seed=3,
    )
    for epochs, others in zip(*both(world, "samples"), strict=True):
        for one, other in zip(epochs, others, strict=True):
            assert sorted(one + other) == list(range(32))


def test_a_script_that_seeds_by_itself_keeps_its_seeds(world: Ranks) -> None:
    world.ok(MODEL + "torch.manual_seed(11)\n" + TRAIN + "own = masks", seed=3)
    one, other = both(world, "own")
    assert one == other


def test_ranks_of_one_tensor_parallel_model_draw_the_same_masks(world: Ranks) -> None:
    world.ok(
        """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4), torch.nn.Dropout(0.5))
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        model = parallelize_module(model, init_device_mesh("cpu", (world_size,)), plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        mask = (model[2](torch.ones(64)) > 0).tolist()
        """,
        seed=3,
    )
    one, other = both(world, "mask")
    assert one == other


def test_fully_sharded_ranks_begin_with_one_model_and_part(world: Ranks) -> None:
    world.ok(
        MODEL
        + """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
gathered = [p.full_tensor().tolist() for p in model.parameters()] == weights
mask = (torch.nn.functional.dropout(torch.ones(64)) > 0).tolist()
""",
        seed=3,
    )
    assert both(world, "gathered") == (True, True)
    one, other = both(world, "mask")
    assert one != other


@pytest.mark.parametrize(
    "name", ["accelerate", "plain torch", "run.steps", pytest.param("workers", marks=pytest.mark.story)]
)
def test_a_seeded_run_resumes_to_the_last_bit(new_world: Callable[..., Ranks], name: str) -> None:
    code = "def set_seed(_): pass\n"
    wanted, world = new_world(), new_world()

    def unseeded(die: int) -> str:
        return cell(name, die).replace("\nset_seed(7)\n", "\n" + code)

    wanted.ok(unseeded(0), seed=5)
    outcome = world.ok(unseeded(29), seed=5, checkpoint_every=4, max_restarts=3)
    assert resumed(outcome)
    for one, other in zip(results(wanted), results(world), strict=True):
        assert same(one, other)
    first, second = results(world)
    assert first["next"] != second["next"]
