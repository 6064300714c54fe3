"""Optimizers whose model was spread after they were made train the parameters of now."""

from __future__ import annotations

import pytest
import torch

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.parallel.strategies.prepared import PreparedModels


def spread(optimizer_of: type[torch.optim.Optimizer], steps_before: int) -> torch.optim.Optimizer:
    """An optimizer of a model whose weight has become another one, half as large."""
    known, model = PreparedModels(), torch.nn.Linear(4, 2, bias=False)
    optimizer = optimizer_of(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    for _ in range(steps_before):
        model(torch.ones(4)).sum().backward()
        optimizer.step()
    before = dict(model.named_parameters())
    model.weight = torch.nn.Parameter(torch.ones(1, 4))
    known.add(model, before)
    known.remap(optimizer)
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    assert model.weight.tolist() != [[1.0] * 4]
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizer_that_has_not_stepped_goes_on(kind: type[torch.optim.Optimizer]) -> None:
    (state,) = spread(kind, 0).state.values() or ({},)
    assert all(value.shape == (1, 4) for value in state.values() if isinstance(value, torch.Tensor) and value.ndim)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_one_that_has_stepped_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(UsageError, match="has made steps before its model was spread"):
        spread(kind, 1)
