"""A rank that changes its replica without a word is named at the next checkpoint; sound ones are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.planned_cells import training
from tests.support.resuming import notes
from tests.support.worlds import AgentProcess, Outcome, Ranks

CHECKPOINT = "run.checkpoint() if step % 2 == 0 else None"
WRITE = "[p for p in model.parameters()][3].data.mul_(2) if step == 3 and rank == 1 else None"
ONE_RANK_WRITES = f"{WRITE}; {CHECKPOINT}"


@pytest.fixture(scope="module")
def four(node_agent: AgentProcess) -> Iterator[Ranks]:
    ranks = Ranks(node_agent, 4)
    yield ranks
    ranks.end()


def splits(outcome: Outcome) -> list[str]:
    return [note for note in notes(outcome) if "replicas of the model differ" in note]


@pytest.mark.parametrize(
    ("plan", "tensor", "where"),
    [
        ("ddp", "", "rank 1 than on ranks 0, 2, 3"),
        pytest.param("hsdp:2x2", " (shard 1)", "rank 3 than on rank 1", marks=pytest.mark.story),
    ],
)
def test_a_silent_split_is_named_with_its_first_tensor(four: Ranks, plan: str, tensor: str, where: str) -> None:
    name = "name = [n.removeprefix('module.') for n, _ in model.named_parameters()][3]"
    (said,) = splits(four.ok(training(batch=2, after=ONE_RANK_WRITES) + name, plan=plan))
    assert f"at step 4: parameter {four.pull('name')}{tensor} is another one on {where}." in said
    assert "They were alike at step 2." in said


@pytest.mark.parametrize(
    "plan",
    [
        "ddp",
        pytest.param("hsdp:2x2", marks=pytest.mark.story),
        pytest.param("fsdp", marks=pytest.mark.soak),
        pytest.param("tp:4", marks=pytest.mark.soak),
        "local-sgd:3",
    ],
)
def test_sound_replicas_are_not_suspected_though_their_random_numbers_differ(four: Ranks, plan: str) -> None:
    after = f"torch.rand(rank + 1); {CHECKPOINT}"
    assert splits(four.ok(training(batch=2 if plan != "tp:4" else 8, after=after), plan=plan)) == []


def test_running_statistics_of_each_ranks_own_data_are_no_split(four: Ranks) -> None:
    cell = """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
accelerator = Accelerator()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(torch.randn(64, 3), batch_size=4))
for rows in loader:
    accelerator.backward(model(rows).pow(2).mean())
    optimizer.step()
    optimizer.zero_grad()
    run.checkpoint()
means = model.module[1].running_mean.tolist()
"""
    assert splits(four.ok(cell)) == []
    assert four.pull("means", 0) != four.pull("means", 1)  # they do differ


def test_replicas_that_train_apart_by_accelerates_local_sgd_are_no_split(four: Ranks) -> None:
    cell = """
import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from torch.utils.data import DataLoader
accelerator = Accelerator()
torch.manual_seed(0)
model = torch.nn.Linear(3, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(torch.randn(64, 3), batch_size=4))
with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=3) as local_sgd:
    for rows in loader:
        accelerator.backward(model(rows).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        local_sgd.step()
        run.checkpoint()
        apart = model.module.weight.tolist()
"""
    assert splits(four.ok(cell)) == []
    assert four.pull("apart", 0) != four.pull("apart", 1)
