"""A plan that a cell does not come to is said: it would train as if there were none."""

from __future__ import annotations

import pytest

from tests.support.worlds import Ranks

PLAIN = """
import torch
from torch.nn.parallel import DistributedDataParallel
model = DistributedDataParallel(torch.nn.Linear(2, 2))
"""
PREPARED = """
import torch
from accelerate import Accelerator
model = Accelerator().prepare(torch.nn.Linear(2, 2))
"""
TRAIN = """
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
"""


@pytest.mark.parametrize(
    ("cell", "plan", "is_said"),
    [(PLAIN, "fsdp", True), (PLAIN, "local-sgd:2", True), (PLAIN, "ddp", False), (PREPARED, "fsdp", False)],
    ids=["fsdp", "local-sgd", "ddp", "prepared"],
)
def test_a_plan_that_no_model_was_spread_by_is_said_once(world: Ranks, cell: str, plan: str, is_said: bool) -> None:
    told = world.ok(cell + TRAIN, plan=plan).text(kind="stderr")
    assert (
        told.count(f"--plan {plan}: the model that is trained here was not handed to accelerator.prepare()") == is_said
    )
