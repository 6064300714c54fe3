"""Outer steps of DiLoCo, in one process: as many as there are rounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from jupyter_llmcloud.core.parallel.plan import parse_plan
from jupyter_llmcloud.training.parallel.strategies.diloco import DiLoCo
from jupyter_llmcloud.training.parallel.strategies.local_sgd import LocalSGD

LR, OUTER_LR, MOMENTUM = 0.1, 0.7, 0.9


@pytest.fixture(autouse=True, scope="module")  # gloo keeps a port of the first group of a process
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(plan: str, num_steps: int) -> float:
    """A weight whose gradient is always 1, when its cell has ended."""
    strategy = DiLoCo(parse_plan(plan), 0, 1, torch.device("cpu"))
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    model = strategy.parallelize(model, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(num_steps):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        strategy.after_step(optimizer)
    strategy.end()
    strategy.end()  # a cell in which nothing is trained
    return float(model.weight.detach())


def outer(*rounds: int) -> float:
    """The same by the formulas, with rounds of so many steps."""
    weight = momentum = 0.0
    for steps in rounds:
        gradient = steps * LR
        momentum = MOMENTUM * momentum + gradient
        weight -= OUTER_LR * (gradient + MOMENTUM * momentum)
    return weight


@pytest.mark.parametrize(("num_steps", "rounds"), [(4, (2, 2)), (5, (2, 2, 1)), (1, (1,))])
def test_the_end_of_a_cell_is_an_outer_step_only_of_what_was_trained_since_the_last_one(
    num_steps: int, rounds: tuple[int, ...]
) -> None:
    plan = f"diloco:2,outer-lr={OUTER_LR},momentum={MOMENTUM}"
    assert trained(plan, num_steps) == pytest.approx(outer(*rounds), abs=1e-6)


def test_what_is_under_way_at_the_end_of_a_cell_is_applied_once() -> None:
    plan = f"diloco:2,outer-lr={OUTER_LR},momentum={MOMENTUM},delay=1"
    assert trained(plan, 2) == pytest.approx(outer(2), abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "plan"), [(LocalSGD, "local-sgd:4"), (DiLoCo, "diloco:4")], ids=["local-sgd", "diloco"]
)
def test_a_checkpoint_knows_models_by_their_names_and_not_by_their_order(kind: type[LocalSGD], plan: str) -> None:
    def made(*names: str) -> tuple[LocalSGD, dict[str, torch.nn.Module]]:
        strategy = kind(parse_plan(plan), 0, 1, torch.device("cpu"))
        return strategy, {name: strategy.parallelize(torch.nn.Linear(1, 1), None) for name in names}

    def step(strategy: LocalSGD, model: torch.nn.Module, num: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for _ in range(num):
            strategy.after_step(optimizer)

    strategy, models = made("other", "model")
    step(strategy, models["other"], 3)
    step(strategy, models["model"], 5)
    saved = strategy.state(lambda _, tensor: tensor.clone(), {"model": models["model"]})
    again, only = made("model")
    again.put(saved, only)
    assert [(replica.num_steps, replica.num_left) for replica in again.replicas] == [
        (replica.num_steps, replica.num_left) for replica in strategy.replicas[1:]
    ]
    strategy.forget()
    assert not strategy.replicas, "models that a new rank has no part of are trained together no more"


def test_models_are_known_alike_after_a_cell_in_which_one_rank_could_not_prepare_its_own() -> None:
    """It had no memory for it, say: what it trained from then on was not averaged at the end of any cell."""
    ranks = [LocalSGD(parse_plan("local-sgd:4"), rank, 2, torch.device("cpu")) for rank in range(2)]
    ranks[0].parallelize(torch.nn.Linear(1, 1), None)  # of the cell that failed: nobody has it any more
    for strategy in ranks:
        strategy.broken()
    models = [strategy.parallelize(torch.nn.Linear(1, 1), None) for strategy in ranks]
    assert [strategy.replicas[-1].serial for strategy in ranks] == [0, 0] and len(models) == 2
