"""What the parameter server of `--plan async-ps` holds when a run goes on from a checkpoint, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jupyter_llmcloud.core.parallel.plan import parse_plan
from jupyter_llmcloud.training.parallel.asynchronous.strategy import AsyncParameterServer

PLAN = "async-ps:1,staleness=0,momentum=0.5"


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def strategy() -> Iterator[AsyncParameterServer]:
    made = AsyncParameterServer(parse_plan(PLAN), 0, 1, torch.device("cpu"))
    yield made
    made.leave()


def prepared(strategy: AsyncParameterServer) -> torch.nn.Module:
    """A weight of 0, which an earlier cell has handed to the plan."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    strategy.begin("earlier")
    strategy.parallelize(model, None)
    strategy.end()
    strategy.close()
    return model


def train(strategy: AsyncParameterServer, model: Any, num_steps: int) -> None:
    """Each step moves the weight by as much: where it is tells of every step that the server has counted."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    for _ in range(num_steps):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        strategy.after_step(optimizer)


@pytest.mark.parametrize("begins", [True, False], ids=["after a step", "before any"])
def test_a_model_that_an_earlier_cell_has_prepared_goes_on_from_its_checkpoint(
    strategy: AsyncParameterServer, begins: bool
) -> None:
    undisturbed = prepared(strategy)
    strategy.begin("whole")
    train(strategy, undisturbed, 8)
    strategy.end()
    strategy.close()

    model = prepared(strategy)
    strategy.begin("fails")
    train(strategy, model, 4)
    saved = strategy.state(lambda name, tensor: tensor.clone(), {"model": model})
    weight = model.weight.detach().clone()
    train(strategy, model, 2)
    strategy.close()

    strategy.begin("resumed")
    if begins:
        train(strategy, model, 1)
    model.weight.data.copy_(weight)
    strategy.put(saved, {"model": model})
    train(strategy, model, 4)
    strategy.end()
    assert model.weight.item() == undisturbed.weight.item()


def test_a_model_whose_values_come_from_elsewhere_is_what_the_server_holds(strategy: AsyncParameterServer) -> None:
    model = prepared(strategy)
    strategy.begin("first")
    train(strategy, model, 4)
    strategy.end()
    strategy.close()

    strategy.begin("resumed")
    model.weight.data.fill_(3.0)
    strategy.put(None, {"model": model})
    train(strategy, model, 1)
    strategy.end()
    assert model.weight.item() == 3.0 - 0.125 * 1.5  # the step, and its momentum
