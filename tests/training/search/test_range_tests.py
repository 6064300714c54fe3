"""Range tests on a net of this process: what they suggest trains, and nothing of theirs stays."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.search import range_test


class LoneRun:
    """As much of a run as they use."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.logged.append(values)

    def progress(self, *_: Any) -> None:
        pass


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(4)


def parts(optimizer_of: Any = torch.optim.SGD) -> tuple[Any, Any, DataLoader[Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    return model, optimizer_of(model.parameters(), lr=0.5), DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 32)


@pytest.mark.parametrize("optimizer_of", [torch.optim.SGD, torch.optim.AdamW])
def test_a_rate_is_found_and_everything_is_as_it_was(optimizer_of: Any) -> None:
    model, optimizer, loader = parts(optimizer_of)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    numbers = torch.get_rng_state()
    run: Any = LoneRun()
    found = range_test.lr_find(
        run,
        model,
        optimizer,
        loader,
        torch.nn.functional.mse_loss,
        low=1e-6,
        high=10.0,
        num_steps=80,
    )
    assert found["rate"] is not None and 1e-5 < found["rate"] < 10 and len(run.logged) == len(found["losses"])
    after = (model.state_dict(), optimizer.state_dict())
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert after[1] == before[1] and torch.equal(torch.get_rng_state(), numbers)
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


def test_batches_grow_and_one_is_suggested() -> None:
    model, optimizer, loader = parts()
    weights = copy.deepcopy(model.state_dict())
    run: Any = LoneRun()
    loss = torch.nn.functional.mse_loss
    found = range_test.batch_find(run, model, optimizer, loader, loss, first=4, most=64)
    sizes = [row[0] for row in found["sizes"]]
    assert sizes == [4 * 2**at for at in range(len(sizes))] and found["size"] in sizes and found["reason"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())


def test_what_gives_no_loss_or_has_no_rows_is_refused_by_name() -> None:
    model, optimizer, _ = parts()
    run: Any = LoneRun()
    with pytest.raises(UsageError, match="name a loss function"):
        range_test.lr_find(
            run,
            model,
            optimizer,
            [torch.zeros(2, 4)],
            None,
            low=1e-6,
            high=1.0,
            num_steps=20,
        )
    with pytest.raises(UsageError, match="batches of two parts"):
        range_test.lr_find(
            run,
            model,
            optimizer,
            [torch.zeros(2, 4)],
            min,
            low=1e-6,
            high=1.0,
            num_steps=20,
        )
    with pytest.raises(UsageError, match="rows have numbers"):
        range_test.batch_find(run, model, optimizer, iter([]), None, first=1, most=0)
    stream: Any = DataLoader(Stream(), 2)
    with pytest.raises(UsageError, match="rows have numbers, not DataLoader of a stream"):
        range_test.batch_find(run, model, optimizer, stream, None, first=1, most=0)


def test_frozen_layers_the_order_of_rows_and_gradients_are_as_they_were() -> None:
    model, optimizer, loader = parts()
    order = torch.Generator().manual_seed(7)
    loader = DataLoader(loader.dataset, 32, shuffle=True, generator=order)
    model.train()
    model[1].eval()  # running statistics of a layer that is not to learn
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, mean = order.get_state().clone(), model[1].running_mean.clone()
    run: Any = LoneRun()
    for find in (
        lambda: range_test.lr_find(
            run, model, optimizer, loader, torch.nn.functional.mse_loss, low=1e-6, high=1.0, num_steps=20
        ),
        lambda: range_test.batch_find(run, model, optimizer, loader, torch.nn.functional.mse_loss, first=2, most=4),
    ):
        find()
        assert [part.training for part in model.modules()] == [True, True, False, True]
        assert torch.equal(order.get_state(), before) and torch.equal(model[1].running_mean, mean)
        assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[2].weight.grad is None


def test_a_frozen_layer_is_frozen_during_the_test_too() -> None:
    model, optimizer, loader = parts()
    model.train()
    model[1].eval()
    seen: list[bool] = []
    model[1].register_forward_hook(lambda layer, *_: seen.append(layer.training))
    run: Any = LoneRun()
    range_test.lr_find(run, model, optimizer, loader, torch.nn.functional.mse_loss, low=1e-6, high=1.0, num_steps=20)
    assert seen and not any(seen)
    model.eval()
    seen.clear()
    range_test.lr_find(run, model, optimizer, loader, torch.nn.functional.mse_loss, low=1e-6, high=1.0, num_steps=20)
    assert all(seen) and not model.training and not model[1].training
