"""What the ranks hold alike at a checkpoint is kept once, whoever trains it, and what they do not, by each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.storage.checkpoints import Checkpoint, CheckpointFolder
from jupyter_llmcloud.storage.models import followed_model
from tests.support.resuming import notes, resumed
from tests.support.worlds import Outcome, Ranks

CELL = """
import os, signal, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(3)
accelerator = Accelerator()
plain = torch.nn.Sequential(torch.nn.Linear(4, 8), {norm}, torch.nn.Linear(8, 1))
data = DataLoader(TensorDataset(torch.randn(64, 4), torch.randn(64, 1)), batch_size={batch}, shuffle=True)
model, optimizer, data = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=0.05), data)
turn = 0
for epoch in range({epochs}):
    for x, y in data:
        trained = plain if {apart} else model  # without its wrapper: each rank by itself
        torch.nn.functional.mse_loss(trained(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        turn += 1
        if turn == {die} and rank == 1 and not run.resumed_step:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.barrier()
state = {{name: value.clone() for name, value in plain.state_dict().items()}}
"""


def cell(apart: str = "False", norm: str = "torch.nn.Tanh()", batch: int = 4, die: int = 0, epochs: int = 3) -> str:
    return CELL.format(apart=apart, norm=norm, batch=batch, die=die, epochs=epochs)


def in_order(code: str) -> str:
    """Accelerate shuffles in another way where there is one process."""
    return code.replace(", shuffle=True", "")


def newest(outcome: Outcome) -> Checkpoint:
    found, _ = CheckpointFolder(outcome.folder.path / "checkpoints").newest(resumable=True)
    assert found is not None
    return found


def states(world: Ranks) -> list[dict[str, torch.Tensor]]:
    return [world.pull("state", rank) for rank in range(world.size)]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Ranks come apart, or never, before or after the checkpoint from which they go on.
APART = {"alike": "False", "apart": "True", "apart later": "turn >= 13", "apart before": "turn < 10"}


@pytest.mark.parametrize("apart", APART.values(), ids=list(APART))
def test_each_rank_goes_on_with_its_own(world: Ranks, apart: str) -> None:
    world.ok(cell(apart))
    wanted = states(world)
    outcome = world.ok(cell(apart, die=18), checkpoint_every=4, max_restarts=1)
    assert "resumed from step" in resumed(outcome)[0], notes(outcome)
    for rank, state in enumerate(states(world)):
        assert equal(wanted[rank], state), f"rank {rank}"
    assert equal(*wanted) == (apart == "False")


def test_the_models_and_optimizers_of_ranks_that_train_alike_are_in_one_file_each(world: Ranks) -> None:
    found = newest(world.ok(cell(), checkpoint_every=4))
    assert sorted(found.manifest["same"]) == ["rank-0001.model-1.safetensors", "rank-0001.optimizer-1.state"]
    assert len(list(found.path.glob("*.model-*"))) == len(list(found.path.glob("*.optimizer-*"))) == 1
    apart = newest(world.ok(cell("True"), checkpoint_every=4))
    assert "same" not in apart.manifest
    assert len(list(apart.path.glob("*.model-*"))) == len(list(apart.path.glob("*.optimizer-*"))) == 2


@pytest.mark.parametrize("size", [1, 4])
def test_another_world_goes_on_with_what_all_held(world: Ranks, new_world: Callable[..., Ranks], size: int) -> None:
    """Sums of gradients come in another order there, so its last digits may be others."""
    world.ok(in_order(cell()))
    [wanted, _] = states(world)
    found = newest(world.ok(in_order(cell(epochs=2)), checkpoint_every=4))
    assert found.manifest["same"]
    other = new_world(size)
    resume: dict[str, Any] = {"folder": str(found.path), "step": found.step}
    other.ok(in_order(cell(batch=8 // size)), resume=resume)
    for state in states(other):
        assert all(torch.allclose(value, wanted[name], atol=1e-5) for name, value in state.items())


def test_a_model_whose_statistics_follow_each_ranks_rows_is_followed_as_it_is_saved(world: Ranks) -> None:
    """The first rank's, as --save takes them; of parameters that differ none is."""
    code = cell(norm="torch.nn.BatchNorm1d(8)")
    outcome = world.ok(code, save=["plain"], checkpoint_every=24)
    weights = load_file(followed_model.make(outcome.folder.path, newest(outcome)) / "model.safetensors")
    first, other = states(world)
    assert equal(weights, first) and not equal(first, other)
    outcome = world.ok(code.replace("if False", "if True"), save=["plain"], checkpoint_every=24)
    with pytest.raises(ModelError, match="hold different values"):
        followed_model.make(outcome.folder.path, newest(outcome))
