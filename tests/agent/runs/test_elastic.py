"""A run with --elastic on real agents: it goes on without a worker that is lost, and with one that comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch

from jupyter_llmcloud.storage.runs import RunFolder
from tests.chaos.elastic import HOLDS
from tests.support.worlds import AgentProcess, Ranks, until

pytestmark = pytest.mark.slow

# An ordinary loop with a batch of its own for each rank. `ledger` has the rows of each step in their order, over all.
CELL = """
import time, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
data = TensorDataset(torch.arange(90), torch.randn(90, 4, dtype=torch.float64))
held_out = torch.utils.data.Subset(data, range(0, 90, 7))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * factor, momentum=0.9)  # pushed: also ranks that come have it
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=100)
loader, held_out = DataLoader(data, batch_size=4, shuffle=True), DataLoader(held_out, batch_size=2)
model, optimizer, loader, held_out, schedule = accelerator.prepare(model, optimizer, loader, held_out, schedule)
ledger, losses, rates, evaluated, sizes = [], [], [], [], []
for epoch in range(3):
    for number, (rows, x) in enumerate(loader):
        with accelerator.accumulate(model):
            each = (model(x)[:, 0] - x.sum(1)).square()
            accelerator.backward(each.mean())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ledger.append(accelerator.gather(rows).tolist())
        losses.append(accelerator.gather(each.detach()).mean().item())
        rates.append(optimizer.param_groups[0]["lr"])
        sizes.append((world_size, len(rows), len(loader)))
        at = epoch * len(loader) + number
        run.log(loss=losses[-1])
        if at in (7, 19): print("at", at, flush=True)
        while at in (7, 19) and not (run.folder / f"go-{at}").exists() and "disturbed" in run.name: time.sleep(0.01)
        if at > 19 and world_size == 1 and "disturbed" in run.name: time.sleep(0.2)
    with torch.no_grad():
        model.eval()
        squares = [accelerator.gather_for_metrics((model(x)[:, 0] - x.sum(1)).square()) for _, x in held_out]
        evaluated.append((len(torch.cat(squares)), torch.cat(squares).mean().item()))
        model.train()
found = {"ledger": ledger, "losses": losses, "rates": rates, "evaluated": evaluated}
weights = torch.cat([p.detach().flatten() for p in accelerator.unwrap_model(model).parameters()])
"""


def saved(folder: RunFolder, step: int) -> bool:
    return any(int(path.name.split("-")[1]) >= step for path in (folder.path / "checkpoints").glob("step-*"))


def close(one: Any, other: Any) -> bool:
    return torch.allclose(torch.tensor(one).double(), torch.tensor(other).double(), rtol=1e-9, atol=1e-12)


def as_undisturbed(ranks: Ranks, agent: AgentProcess, num_ranks: int) -> dict[str, Any]:
    """What ranks have found, checked against as many that were left alone: rows, rates, losses and weights."""
    undisturbed = Ranks(agent, num_ranks)
    undisturbed.push(factor=1.0)
    undisturbed.ok(CELL, name="alone")
    wanted, found = undisturbed.pull("found"), ranks.pull("found")
    assert found["ledger"] == wanted["ledger"]
    assert found["rates"] == wanted["rates"]
    for name in ("losses", "evaluated"):
        assert close(found[name], wanted[name]), name
    assert torch.allclose(ranks.pull("weights"), undisturbed.pull("weights"), rtol=1e-9, atol=1e-12)
    undisturbed.end()
    return dict(found)


def test_a_run_that_loses_a_worker_and_gets_another_one_trains_as_if_nothing_had_happened(
    own_agent: Callable[..., AgentProcess], node_agent: AgentProcess
) -> None:
    leader, other = own_agent(slots=2), own_agent(slots=1)
    ranks = Ranks(leader, 2, shares=[(other, 1), (leader, 1)])
    in_the_way = Ranks(leader, 1)  # no room for a second rank beside the leader's
    ranks.ok("kept = f'of rank {rank}'")
    ranks.push(factor=1.0)
    running = ranks.send(CELL, name="disturbed", elastic="1:2", max_restarts=1, checkpoint_every=3).wait_for("at 7", 2)
    folder = running.outcome.folder
    until(lambda: saved(folder, 3), "a checkpoint is there")
    other.process.kill()
    (folder.path / "go-7").touch()
    running.wait_for("at 19", times=1)
    in_the_way.end()
    (folder.path / "go-19").touch()
    outcome = running.end()

    record = outcome.record
    assert outcome.state == "finished", (record.errors, record.history)
    assert (record.num_restarts, record.num_resizes, record.ranks) == (0, 2, [0, 1])
    sizes = ranks.pull("sizes")
    assert [size for size, _ in groupby(sizes)] == [(2, 4, 12), (1, 8, 12), (2, 4, 12)]
    assert ranks.pull("kept") == "of rank 1"  # it was renumbered

    found = as_undisturbed(ranks, node_agent, 2)
    assert all({row for step in found["ledger"][at : at + 12] for row in step} == set(range(90)) for at in (0, 12, 24))
    ranks.end()


def test_those_that_are_left_go_on_from_where_they_are_without_a_checkpoint(
    own_agent: Callable[..., AgentProcess], node_agent: AgentProcess
) -> None:
    leader, other = own_agent(slots=2), own_agent(slots=1)
    ranks = Ranks(leader, 3, shares=[(leader, 2), (other, 1)])
    ranks.push(factor=1.0)
    cell = HOLDS + CELL.replace("at in (7, 19)", "at == 4")  # between two steps of the optimizer
    running = ranks.send(cell, name="disturbed", elastic="2:3", max_restarts=1, checkpoint_every=1000)
    running.wait_for("at 4", times=3)
    folder = running.outcome.folder
    other.process.kill()
    until(lambda: saved(folder, 2), "those that are left have written what they hold")
    (folder.path / "go-4").touch()
    outcome = running.end()

    record = outcome.record
    assert outcome.state == "finished", (record.errors, record.history)
    assert any("resumed from step 2 on 2 ranks" in entry.get("why", "") for entry in record.history), record.history
    assert [size for size, _ in groupby(ranks.pull("sizes"))] == [(3, 4, 8), (2, 6, 8)]
    as_undisturbed(ranks, node_agent, 3)
    ranks.end()


TRAINER = """
import tempfile, time, torch
from transformers import Trainer, TrainerCallback, TrainingArguments

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    def forward(self, x, labels=None):
        out = self.layers(x)
        return {"loss": (out - labels).square().mean(), "logits": out}

class Wait(TrainerCallback):
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 7: print("at 7", flush=True)
        while state.global_step == 7 and not (run.folder / "go-7").exists() and run.name == "disturbed": time.sleep(0.01)

torch.manual_seed(0)
x = torch.randn(92, 4, dtype=torch.float64)
rows = [{"x": row, "labels": row.sum(0, keepdim=True)} for row in x]
model = Net()
arguments = TrainingArguments(
    tempfile.mkdtemp(), num_train_epochs=3, per_device_train_batch_size=4, per_device_eval_batch_size=2, seed=3,
    gradient_accumulation_steps=2, eval_strategy="epoch", logging_steps=1, save_strategy="no", report_to=[],
    learning_rate=0.01, disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:13], callbacks=[Wait()])
trainer.train()
log = trainer.state.log_history
found = {name: [entry[name] for entry in log if name in entry]
         for name in ("loss", "eval_loss", "learning_rate", "epoch")}
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
"""


@pytest.mark.soak
def test_a_trainer_that_goes_on_with_fewer_ranks_trains_as_if_nothing_had_happened(
    own_agent: Callable[..., AgentProcess], node_agent: AgentProcess
) -> None:
    leader, other = own_agent(slots=1), own_agent(slots=1)
    ranks = Ranks(leader, 2, shares=[(leader, 1), (other, 1)])
    running = ranks.send(TRAINER, name="disturbed", elastic="1:2", max_restarts=1, checkpoint_every=3)
    folder = running.wait_for("at 7", 2).outcome.folder
    until(lambda: saved(folder, 6), "a checkpoint is there")
    other.process.kill()
    (folder.path / "go-7").touch()
    outcome = running.end()
    assert outcome.state == "finished", (outcome.record.errors, outcome.record.history)
    assert (outcome.record.num_restarts, outcome.record.num_resizes) == (0, 1)
    assert any("resumed from step 6" in note for note in outcome.record.notes)
    undisturbed = Ranks(node_agent, 2)
    undisturbed.ok(TRAINER, name="alone")
    wanted, found = undisturbed.pull("found"), ranks.pull("found")
    assert found["learning_rate"] == wanted["learning_rate"] and found["epoch"] == wanted["epoch"]
    assert torch.allclose(ranks.pull("weights"), undisturbed.pull("weights"), rtol=1e-6)
    for name in ("loss", "eval_loss"):
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(wanted[name]), rtol=1e-4), name
    undisturbed.end()
    ranks.end()


@pytest.mark.soak
def test_a_run_whose_batch_is_too_large_for_the_ranks_that_are_left_waits_for_more(
    own_agent: Callable[..., AgentProcess],
) -> None:
    code = CELL.replace(
        "    for number", "    if world_size == 1: raise torch.OutOfMemoryError('too much')\n    for number"
    )
    leader, other = own_agent(slots=2), own_agent(slots=1)
    ranks = Ranks(leader, 2, shares=[(leader, 1), (other, 1)])
    in_the_way = Ranks(leader, 1)
    ranks.push(factor=1.0)
    running = ranks.send(code, name="disturbed", elastic="1:2", max_restarts=1, checkpoint_every=3).wait_for("at 7", 2)
    folder = running.outcome.folder
    until(lambda: saved(folder, 3), "a checkpoint is there")
    other.process.kill()
    (folder.path / "go-7").touch()
    (folder.path / "go-19").touch()
    deadline = time.monotonic() + 60
    while not any("waits for capacity" in row.detail for row in running.outcome.states):
        running._take(deadline, "the run waits for more ranks")
    in_the_way.end()
    outcome = running.end()
    assert outcome.state == "finished", (outcome.record.errors, outcome.record.history)
    assert outcome.record.num_restarts == 0
    assert any("too small for the batch of 2" in note for note in outcome.record.notes)
    assert len(ranks.pull("found")["ledger"]) == 36
    ranks.end()
