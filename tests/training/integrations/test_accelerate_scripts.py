"""Ordinary Accelerate and Trainer scripts, unmodified, as cells on two ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.test_utils import scripts as accelerate_scripts

from tests.support.worlds import Outcome, Ranks

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run_script(world: Ranks, name: str) -> Outcome:
    """The file's text as the body of a cell."""
    return world.ok((SCRIPTS / f"{name}.py").read_text(encoding="utf-8"), name=name)


@pytest.mark.parametrize("again", [1, 2])
def test_classification_with_gather_for_metrics(world: Ranks, again: int) -> None:
    outcome = run_script(world, "classification")
    accuracies = outcome.values("accuracy")
    assert len(accuracies) > 3
    assert accuracies[-1] > max(0.8, accuracies[0])
    assert outcome.values("accuracy", 1) == accuracies
    assert outcome.values("loss", 0) != outcome.values("loss", 1)  # each rank has its own share of the data
    assert "over 301 points" in outcome.text(0)  # the last batch is not counted twice
    assert outcome.text(1) == ""  # accelerator.print speaks on one rank
    assert [row["values"] for rank, row in outcome.folder.records("metrics") if rank == 0 and "values" in row] == [
        row["values"] for rank, row in outcome.metrics if rank == 0 and "values" in row
    ]


def test_gradient_accumulation_with_a_schedule_and_a_progress_bar(world: Ranks) -> None:
    outcome = run_script(world, "accumulation")
    losses = outcome.values("loss")
    assert losses[-1] < losses[0] / 2
    assert losses == outcome.values("loss", 1)
    updates, first, last = re.search(r"(\d+) updates, loss ([\d.]+) -> ([\d.]+)", outcome.text(0)).groups()  # type: ignore[union-attr]
    assert (float(first), float(last)) == (pytest.approx(losses[0], abs=1e-4), pytest.approx(losses[-1], abs=1e-4))
    steps = [row["step"] for rank, row in outcome.metrics if rank == 0 and "values" in row]
    assert steps[-1] == int(updates)
    done, total = [row["progress"] for rank, row in outcome.metrics if rank == 0 and "progress" in row][-1]
    assert done == total


WITH_TORCHDATA = [
    pytest.mark.soak,
    pytest.mark.skipif(find_spec("torchdata") is None, reason="its last part needs torchdata"),
]


@pytest.mark.parametrize(
    "name", ["test_script", "test_sync", "test_ops", pytest.param("test_distributed_data_loop", marks=WITH_TORCHDATA)]
)
def test_accelerates_own_scripts_pass(world: Ranks, name: str) -> None:
    outcome = world.ok(Path(accelerate_scripts.__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
    assert outcome.text(0).lower().count("test") > 3
    world.ok("import torch, torch.distributed as dist\ndist.all_reduce(torch.ones(1))")  # it leaves the group usable


def test_a_trainer_fine_tune(world: Ranks) -> None:
    outcome = run_script(world, "trainer")
    assert outcome.values("loss")[-1] < outcome.values("loss")[0]
    assert len(outcome.values("eval_loss")) >= 4
    said = [re.search(r"rank (\d) of 2: (\d+) steps, eval_loss ([\d.]+)", outcome.text(rank)) for rank in (0, 1)]
    assert all(said)
    first, second = (match.groups() for match in said if match)
    assert (first[0], second[0]) == ("0", "1")
    assert first[1:] == second[1:]
    assert [int(first[1])] * 2 in [row["progress"] for rank, row in outcome.metrics if rank == 0 and "progress" in row]


SAME_LOSSES = """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator()
torch.manual_seed(0)
x = torch.randn(256, 8)
y = x @ torch.randn(8, 1) + 0.1 * torch.randn(256, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(TensorDataset(x, y), batch_size=16 // accelerator.num_processes)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(2):
    for inputs, targets in loader:
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": accelerator.reduce(loss.detach(), "mean").item()})
"""


def test_two_ranks_lose_like_one_with_the_doubled_batch(world: Ranks, new_world: Callable[..., Ranks]) -> None:
    double = world.ok(SAME_LOSSES).values("loss")
    single = new_world(1).ok(SAME_LOSSES).values("loss")
    assert len(single) == 32
    assert double == pytest.approx(single, rel=1e-4)
    assert single[-1] < single[0] / 5
