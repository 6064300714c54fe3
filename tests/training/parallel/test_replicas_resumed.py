"""Replicas that train apart go on from a checkpoint as undisturbed, whatever other models there are on some ranks."""

from __future__ import annotations

import pytest
import torch

from tests.support.worlds import Ranks

OTHER = """
import torch
from accelerate import Accelerator
accelerator = Accelerator()
torch.manual_seed(3)
other = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
other, optimizer = accelerator.prepare(other, optimizer)
for step in range(3):
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
CELL = """
import os, signal, torch
from accelerate import Accelerator
accelerator = Accelerator()
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.arange(88.0).reshape(22, 4).sin(), batch_size=1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
step, means = 0, []
for rows in loader:
    loss = (model(rows) - 1 - rank).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    means.append(accelerator.gather(model.weight.detach()).mean().item())
    step += 1
    if step == DIE and rank == 1 and not (run.folder / "died").exists():
        (run.folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["local-sgd:4", "diloco:4,outer-lr=1,momentum=0.5"])
def test_a_rank_is_killed_after_another_model_was_trained(world: Ranks, plan: str) -> None:
    options = {"plan": plan, "checkpoint_every": 3, "max_restarts": 1}
    world.ok(CELL.replace("DIE", "0"), **options)
    wanted = [(world.pull("means", rank), world.pull("model", rank).state_dict()) for rank in range(2)]
    world.ok(OTHER, plan=plan)
    outcome = world.ok(CELL.replace("DIE", "8"), **options)
    assert outcome.record.num_restarts == 1
    for rank, (means, state) in enumerate(wanted):
        assert world.pull("means", rank) == means
        assert all(torch.equal(value, state[name]) for name, value in world.pull("model", rank).state_dict().items())
