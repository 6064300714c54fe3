"""Buffers of models that are trained apart: what ranks have of their own data is averaged, a constant stays what it is."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.worlds import Ranks

LOWEST = torch.finfo(torch.float32).min

CELL = """
import torch
from accelerate import Accelerator

class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        lowest = torch.finfo(torch.float32).min
        self.register_buffer("mask", torch.full((3, 3), lowest).triu(1))
        self.register_buffer("never", torch.tensor([float("-inf"), float("nan"), 0.1]))
        self.register_buffer("halves", torch.tensor([torch.finfo(torch.float16).min, 0.1], dtype=torch.float16))
        self.register_buffer("doubles", torch.tensor([1 + 2**-40], dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        return self.linear(x)

accelerator = Accelerator()
model = Masked()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
for step in range(2):
    model(torch.ones(1, 2)).sum().backward()
    model.seen.fill_(1.0 + rank)
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize("plan", ["local-sgd:2", "diloco:2", "async-ps:2"])
def test_only_what_differs_between_ranks_is_averaged(world: Ranks, plan: str) -> None:
    world.ok(CELL, plan=plan)
    world.ok("held = {name: value.clone() for name, value in model.named_buffers()}")
    for rank in range(2):
        held = world.pull("held", rank)
        assert torch.equal(held["mask"], torch.full((3, 3), LOWEST).triu(1))
        assert held["halves"].tolist() == [
            torch.finfo(torch.float16).min,
            float(torch.tensor(0.1, dtype=torch.float16)),
        ]
        assert held["doubles"].item() == 1 + 2**-40
        never = held["never"].tolist()
        assert never[0] == -math.inf and math.isnan(never[1]) and never[2] == pytest.approx(0.1)
        assert held["seen"].item() == 1.5
