"""A run with --elastic on real agents: it goes on without a worker that is lost, and with one that comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jupyter_llmcloud.storage.runs import RunFolder
from tests.support.worlds import AgentProcess, Ranks, until

pytestmark = pytest.mark.slow

# Each row's gradient is its own number: the weight says which rows were seen how often, whatever the world was.
CELL = """
import os, time, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
accelerator = Accelerator()
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
rows = torch.arange(240.0)
loader = DataLoader(TensorDataset(rows, rows), batch_size=4 // world_size, shuffle=False)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(2):
    for number, (x, y) in enumerate(loader):
        loss = (model(x[:, None])[:, 0]).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss.item(), epoch=epoch, first=x[0].item(), rows=x.tolist(), size=world_size)
        if epoch * 60 + number == 20: print("here", flush=True)
        if "slow" in run.name and number > 20: time.sleep(0.1)
        while epoch * 60 + number == 20 and not (run.folder / "go").exists(): time.sleep(0.01)
weight = accelerator.unwrap_model(model).weight.item()
"""
ALL_ROWS = -2 * sum(range(240)) / 4  # two epochs of batches of four, as one process does it


@pytest.fixture
def make_agent() -> Iterator[Callable[..., AgentProcess]]:
    """Makes agents that end with the test."""
    agents: list[AgentProcess] = []

    def make(**options: Any) -> AgentProcess:
        agents.append(AgentProcess(**options))
        return agents[-1]

    yield make
    for agent in agents:
        agent.end()


def elastic(ranks: Ranks, bounds: str, name: str = "cell", **more: Any) -> Any:
    return ranks.send(CELL, name=name, elastic=bounds, max_restarts=1, checkpoint_every=5, **more)


def saved(folder: RunFolder) -> bool:
    return any((folder.path / "checkpoints").glob("step-*"))


def test_a_world_that_loses_the_worker_of_its_first_rank_goes_on_smaller_and_every_row_counts_once(
    make_agent: Callable[..., AgentProcess],
) -> None:
    leader, other = make_agent(slots=1), make_agent(slots=1)
    ranks = Ranks(leader, 2, shares=[(other, 1), (leader, 1)])
    ranks.ok("kept = f'of rank {rank}'")
    running = elastic(ranks, "1:2").wait_for("here", times=2)
    until(lambda: saved(running.outcome.folder), "a checkpoint is there")
    other.process.kill()
    (running.outcome.folder.path / "go").touch()
    outcome = running.end()
    record = outcome.record
    assert outcome.state == "finished", (record.errors, record.history)
    assert (record.num_restarts, record.num_resizes, record.ranks) == (0, 1, [0])
    assert any("on 1 rank" in note for note in record.notes)
    assert ranks.ok("weight, kept, rank, world_size").results() == [f"({ALL_ROWS}, 'of rank 1', 0, 1)"]


def test_a_world_that_may_be_larger_grows_when_there_is_room_and_every_row_counts_once(
    make_agent: Callable[..., AgentProcess],
) -> None:
    ranks = Ranks(make_agent(slots=2), 1)
    running = elastic(ranks, "1:2", "slow").wait_for("here")
    (running.outcome.folder.path / "go").touch()
    outcome = running.end()
    record = outcome.record
    assert outcome.state == "finished", (record.errors, record.history)
    assert (record.num_restarts, record.num_resizes, record.ranks) == (0, 1, [0, 1])
    assert ranks.ok("weight, rank, world_size").results() == [f"({ALL_ROWS}, 0, 2)", f"({ALL_ROWS}, 1, 2)"]
