"""What Accelerate's own calls give under a plan, by values."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jupyter_llmcloud.core.parallel.plan import parse_plan
from jupyter_llmcloud.training.integrations import accelerator_plans
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE

MANY = 100_000_001  # more than a float32 holds exactly


class Workers:
    """An asynchronous plan whose two workers have the same value."""

    is_asynchronous = True
    plan = parse_plan("async-ps:4")
    world_size, data_rank = 2, (0, 2)

    def shared_pass(self, loader: Any, own: Any) -> Any:
        return own

    def gathered(self, value: torch.Tensor) -> list[torch.Tensor]:
        return [value, value]

    def wait_for_everyone(self) -> None:
        pass


@pytest.fixture
def active() -> Iterator[Any]:
    yield ACTIVE
    ACTIVE.strategy = None


@pytest.mark.parametrize(
    ("strategy", "total"),
    [
        (Workers(), 2 * MANY),
        (SimpleNamespace(world_size=2, data_rank=(0, 1), is_asynchronous=False), MANY),
    ],
    ids=["async-ps", "tp"],
)
def test_a_count_that_is_summed_up_stays_a_count(active: Any, strategy: Any, total: int) -> None:
    active.strategy = strategy
    reduce = accelerator_plans._make_reduce(lambda self, tensor, reduction, scale: tensor * 2)
    found = reduce(None, torch.tensor([MANY]))
    assert found.dtype == torch.int64
    assert found.tolist() == [total]


def test_a_norm_that_is_not_finite_is_refused_where_the_cell_asks_for_that(active: Any) -> None:
    active.strategy = SimpleNamespace(total_norm=lambda norm, norm_type: norm)
    clip = accelerator_plans._make_clip_grad_norm(torch.nn.utils.clip_grad_norm_)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, float("inf")])
    with pytest.raises(RuntimeError, match="non-finite"):
        clip([weight], 1.0, error_if_nonfinite=True)
    assert weight.grad.tolist() == [1.0, float("inf")], "as it was"
