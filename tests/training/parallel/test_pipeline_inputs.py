"""Gradients leave a pipeline where a batch has entered it: to another model, or to a tensor that is trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.worlds import Ranks

COMMON = """
import torch
from accelerate import Accelerator
from torch import nn

def net(seed, out):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, out))

accelerator = Accelerator()
first, second = net(1, 6), net(2, 3)
prompt = nn.Parameter(torch.full((6,), 0.1))
optimizers = [torch.optim.Adam(part, lr=0.05) for part in (first.parameters(), second.parameters(), [prompt])]
first, second, *optimizers = accelerator.prepare(first, second, *optimizers)
torch.manual_seed(3)
losses = []
for _ in range(4):
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    loss = nn.functional.cross_entropy(CALL, y)
    accelerator.backward(loss)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
kept = prompt.tolist()
"""


@pytest.mark.parametrize("call", ["second(first(x) + prompt)", "second(x + prompt)", "second(first(x)) * prompt[:3]"])
def test_what_is_given_to_a_pipeline_is_trained_as_in_one_process(new_world: Callable[..., Ranks], call: str) -> None:
    alone, two = new_world(1), new_world(2)
    cell = COMMON.replace("CALL", call)
    alone.ok(cell)
    two.ok(cell, plan="pipeline:2")
    for rank in range(2):
        assert two.pull("losses", rank) == pytest.approx(alone.pull("losses"), abs=1e-5)
        assert two.pull("kept", rank) == pytest.approx(alone.pull("kept"), abs=1e-5)


def test_a_trained_tensor_that_lies_too_deep_is_refused(new_world: Callable[..., Ranks]) -> None:
    cell = COMMON.replace("CALL", "second([x + prompt])")
    error = new_world(2).run(cell, plan="pipeline:2").error
    assert error["ename"] == "UsageError", error
    assert "was given a list with a tensor that gradients go back to" in error["evalue"]
