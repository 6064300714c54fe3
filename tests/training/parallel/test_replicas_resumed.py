"""Replicas go on from a checkpoint as undisturbed: apart, beside other models, with what ranks have of their own data."""

from __future__ import annotations

import pytest
import torch

from jupyter_llmcloud.training.checkpoint.stateful_objects import StatefulObject, memory_of
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

# Evaluated without the wrapper, which would give every rank the statistics of the first one before its next step.
NORMALISED = """
import os, signal, torch
from accelerate import Accelerator
accelerator = Accelerator()
torch.manual_seed(0)
inner = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.arange(96.0).reshape(24, 4).sin(), batch_size=4)
model, optimizer, loader = accelerator.prepare(inner, optimizer, loader)
step, seen = 0, []
for epoch in range(2):
    inner.train()
    for rows in loader:
        accelerator.backward(model(rows).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    inner.eval()
    with torch.no_grad():
        seen.append(inner(torch.ones(1, 4)).item())
    if DIE and rank == 1 and not (run.folder / "died").exists():
        (run.folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_the_first_rank_saves_for_all_are_no_buffers_of_another_one() -> None:
    model = torch.nn.BatchNorm1d(2)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    buffers = {b.untyped_storage().data_ptr() for b in model.buffers()}
    shared, own = StatefulObject("model", model, True), StatefulObject("model", model, False)
    assert memory_of([shared], is_first=True) == memory_of([own], is_first=False) == weights | buffers
    assert memory_of([shared], is_first=False) == weights


def test_a_replica_has_the_statistics_of_its_own_data_until_the_next_step(world: Ranks) -> None:
    options = {"checkpoint_every": 3, "max_restarts": 1}
    world.ok(NORMALISED.replace("DIE", "0"), **options)
    wanted = [world.pull("seen", rank) for rank in range(2)]
    assert wanted[0] != wanted[1]
    outcome = world.ok(NORMALISED.replace("DIE", "epoch == 0"), **options)
    assert outcome.record.num_restarts == 1
    assert [world.pull("seen", rank) for rank in range(2)] == wanted


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


@pytest.mark.slow
def test_a_model_of_a_cell_that_failed_may_live_on_one_rank_only(world: Ranks) -> None:
    failed = f"{OTHER}\nif rank == 1:\n    del other, optimizer, accelerator\nraise SystemExit(3)"
    assert world.run(failed, plan="local-sgd:4").state == "failed"
    world.ok(CELL.replace("DIE", "0").replace("in loader:", "in list(loader)[:6]:"), plan="local-sgd:4")
    first, second = (world.pull("model", rank).state_dict() for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_ranks_that_were_at_different_steps_average_at_the_same_ones_from_then_on(world: Ranks) -> None:
    more = "for _ in range(NUM):\n    other(torch.ones(1, 2)).sum().backward()\n    optimizer.step()"
    failed = f"{OTHER}\nfor _ in range(2 * rank):\n    optimizer.step()\nassert rank"  # rank 1 has averaged alone
    assert world.run(failed, plan="local-sgd:4").state == "failed"
    world.ok(more.replace("NUM", "4"), plan="local-sgd:4")
    held = [world.pull("other", rank).state_dict() for rank in range(2)]
    assert all(torch.equal(value, held[1][name]) for name, value in held[0].items())
