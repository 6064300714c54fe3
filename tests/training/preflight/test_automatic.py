"""A rank warns before its first step when that does not fit, and leaves the training as it would be."""

from __future__ import annotations

import contextlib
import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jupyter_llmcloud.core.parallel.plan import parse_plan
from jupyter_llmcloud.training.preflight.automatic import _FirstForward, _Step
from tests.support.worlds import Ranks

CELL = """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from jupyter_llmcloud.training.preflight import automatic

automatic.available = lambda: left

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lower, self.drop, self.norm = torch.nn.Linear(256, 1024), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(1024)
        self.upper = torch.nn.Linear(1024, 256)
        self.calls = 0

    def forward(self, rows):
        self.calls += 1
        return self.upper(self.norm(self.drop(self.lower(rows))).relu())

torch.manual_seed(rank)
accelerator = Accelerator()
model = Model()
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(torch.ones(64, 256), batch_size=16))
losses = []
for batch in loader:
    loss = model(batch).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
calls = accelerator.unwrap_model(model).calls
"""


@pytest.mark.parametrize("plan", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_step_that_does_not_fit_is_told_and_changes_nothing(world: Ranks, plan: str) -> None:
    world.push(left=1 << 60)
    quiet = world.ok(CELL, plan=plan)
    undisturbed = world.pull("losses")
    world.push(left=150 << 20)
    told = world.ok(CELL, plan=plan)
    assert "memory: a step" not in quiet.text(kind="stderr")
    warning = told.text(0, "stderr")
    assert "beside its parameters" in warning and "activations" in warning
    assert "75 MiB of cpu memory is left" in warning  # each of the two has a half
    assert world.pull("losses") == undisturbed  # the same dropout, the same statistics
    assert world.pull("calls") == 2


@pytest.mark.soak
def test_a_compiled_model_is_left_alone(world: Ranks) -> None:
    world.push(left=4 << 20)
    compiled = CELL.replace("model = Model()", 'model = torch.compile(Model(), backend="eager")')
    told = world.ok(compiled.replace("calls = accelerator.unwrap_model(model).calls", ""))
    assert "memory: a step" not in told.text(kind="stderr")


def test_a_model_is_looked_at_once_and_its_copies_never() -> None:
    model, rows = torch.nn.Linear(4, 2), torch.ones(3, 4)
    seen: list[Any] = []
    first = _FirstForward(model, lambda *batch: seen.append(batch))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(rows)
    with torch.no_grad():
        model(rows)
    first.ignore()
    assert not model._forward_pre_hooks, "nothing of ours is left between cells"
    model(rows)
    assert not seen and first.listen()
    model(rows)
    model(rows)
    assert [batch[0] for batch in seen] == [model] and not first.is_awaited and not model._forward_pre_hooks


def test_what_an_lstm_keeps_for_its_backward_pass_counts() -> None:
    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(16, 64, batch_first=True)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.lstm(rows)[0]
            return output

    accelerator = SimpleNamespace(_optimizers=[], autocast=contextlib.nullcontext)
    step, _ = _Step(Tagger(), parse_plan("ddp")).measured((torch.ones(8, 20, 16),), {}, accelerator)
    written = 8 * 20 * 64 * 4  # bytes of what it gives; six times that are kept
    assert 10 * written < step.activations < 13 * written
