"""A cell that thaws a part of its model after it was prepared: replicas that part are not left unsaid."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.worlds import Ranks

BODY = """
import torch
from accelerate import Accelerator
from torch import nn

torch.manual_seed(1)
accelerator = Accelerator()
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
model[0].requires_grad_(False)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
for step in range(40):
    if step == THAWS:
        accelerator.unwrap_model(model).requires_grad_(True)
        if ANEW:
            plain = accelerator.unwrap_model(model)
            model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    accelerator.backward(model(torch.randn(2, 4) + rank).square().mean())
    optimizer.step()
    optimizer.zero_grad()
weight = accelerator.unwrap_model(model)[0].weight.tolist()
"""


@pytest.mark.parametrize(("thaws", "anew", "is_said"), [(20, False, True), (20, True, False), (99, False, False)])
def test_a_cell_is_told_that_what_it_has_thawed_is_trained_by_each_rank_itself(
    new_world: Callable[..., Ranks], thaws: int, anew: bool, is_said: bool
) -> None:
    two = new_world(2)
    outcome = two.ok(BODY.replace("THAWS", str(thaws)).replace("ANEW", str(anew)))
    said = "0.weight was thawed after the model was prepared" in outcome.text(kind="stderr")
    assert (said, two.pull("weight", 0) != two.pull("weight", 1)) == (is_said, is_said)
