"""`%lr_find` and `%batch_find` on the ranks: a few real steps, after which everything is as it was before."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from jupyter_llmcloud.core.search.range_test import BatchMeasured, has_diverged, suggest_rate, suggest_size, why_stop
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.checkpoint import rng
from jupyter_llmcloud.training.run import Run

STEPS_OF_A_SIZE = 6  # of which the fastest counts: the others have been disturbed, the first one by what is new


def lr_find(
    run: Run, model: Any, optimizer: Any, loader: Any, loss: Any, *, low: float, high: float, num_steps: int
) -> dict[str, Any]:
    """Losses at rates from `low` to `high`, and what they suggest: {"rates", "losses", "rate", "lowest", "reason"}."""
    factor = (high / low) ** (1 / max(1, num_steps - 1))
    rates: list[float] = []
    losses: list[float] = []
    with _as_before(model, optimizer, loader):
        groups = optimizer.param_groups
        largest = max(group["lr"] for group in groups) or 1.0
        shares = [(group["lr"] or largest) / largest for group in groups]
        for step, batch in zip(range(num_steps), _endless(loader), strict=False):
            rate = low * factor**step
            for group, share in zip(groups, shares, strict=True):
                group["lr"] = rate * share
            value = _mean(_step(model, optimizer, batch, loss), run.world_size)
            rates.append(rate)
            losses.append(value)
            run.log({"loss": value, "lr": rate}, step=step)
            run.progress(step + 1, num_steps, "range test")
            if has_diverged(losses):
                break
    found = suggest_rate(rates, losses)
    return {"rates": rates, "losses": losses, "rate": found.rate, "lowest": found.lowest, "reason": found.reason}


def batch_find(
    run: Run, model: Any, optimizer: Any, loader: Any, loss: Any, *, first: int, most: int
) -> dict[str, Any]:
    """Speeds at growing batches, and what they suggest: {"sizes", "size", "reason"}."""
    dataset, collate = _rows(loader)
    most = min(most, len(dataset)) if most else len(dataset)
    measured: list[BatchMeasured] = []
    reason = ""
    size = min(first, most)
    with _as_before(model, optimizer, loader):
        while not reason:
            measured.append(_measure(run, model, optimizer, dataset, collate, loss, size))
            run.log({"rows_per_s": measured[-1].rows_per_s, "batch_size": size}, step=len(measured))
            free = int(_least(float(_free_bytes()), run.world_size))
            reason = why_stop(measured, free, most)
            size *= 2
    rows = [(row.size, row.rows_per_s, row.memory_bytes, row.fits) for row in measured]
    return {"sizes": rows, "size": suggest_size(measured), "reason": reason}


def _measure(
    run: Run, model: Any, optimizer: Any, dataset: Any, collate: Callable[[list[Any]], Any], loss: Any, size: int
) -> BatchMeasured:
    device = next(model.parameters()).device
    start = run.rank * size
    batch = _to(collate([dataset[(start + at) % len(dataset)] for at in range(size)]), device)
    fits, took = 1.0, math.inf
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for _ in range(STEPS_OF_A_SIZE):
            began = time.perf_counter()
            _step(model, optimizer, batch, loss).item()
            took = min(took, time.perf_counter() - began)
    except torch.cuda.OutOfMemoryError:
        fits = 0.0
        torch.cuda.empty_cache()
    fits = _least(fits, run.world_size)
    slowest = -_least(-took, run.world_size)
    rows = size * run.world_size
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return BatchMeasured(size, rows / slowest if fits and slowest else 0.0, int(used), bool(fits))


@contextmanager
def _as_before(model: Any, optimizer: Any, loader: Any) -> Iterator[None]:
    """Afterwards weights, buffers, modes, gradients, the optimizer's state and random numbers are those of before."""
    weights = {name: value.detach().clone() for name, value in _tensors(model)}
    gradients = [(weight, weight.grad.clone()) for weight in model.parameters() if weight.grad is not None]
    modes = [(part, part.training) for part in model.modules()]
    orders = [(generator, generator.get_state()) for generator in rng.generators_of(loader)]
    state, numbers = copy.deepcopy(optimizer.state_dict()), rng.snapshot()
    for weight, _ in gradients:
        weight.grad = None
    if not model.training:  # else layers that are frozen stay so
        model.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in _tensors(model):
                value.copy_(weights[name])
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        for weight, gradient in gradients:
            weight.grad = gradient
        for part, mode in modes:
            part.training = mode
        for generator, order in orders:
            generator.set_state(order)
        rng.restore(numbers)


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from ((f"buffer {name}", value) for name, value in model.named_buffers())


def _step(model: Any, optimizer: Any, batch: Any, loss: Any) -> torch.Tensor:
    optimizer.zero_grad()
    value = _loss_of(model, _to(batch, next(model.parameters()).device), loss)
    value.backward()
    optimizer.step()
    return value.detach()


def _loss_of(model: Any, batch: Any, loss: Any) -> torch.Tensor:
    """By a loss function of (output, target), or the model's own: `model(**batch).loss`."""
    if loss is not None:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise UsageError(
                f"--loss takes batches of two parts, inputs and targets; these are {type(batch).__name__}."
            )
        return _as_loss(loss(model(batch[0]), batch[1]))
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        output = model(**batch)
    else:
        _check_takes(model, parts := _listed(batch))
        output = model(*parts)
    return _as_loss(getattr(output, "loss", output))


def _check_takes(model: Any, parts: list[Any]) -> None:
    """Raise UsageError when a model is not made for batches of so many parts: then they are inputs and targets."""
    inner = getattr(model, "module", model)
    try:
        inspect.signature(inner.forward).bind(*parts)
    except TypeError:
        raise UsageError(
            f"{type(inner).__name__} does not take a batch of {len(parts)} parts: name a loss function of (output, "
            "target) on the ranks, --loss NAME."
        ) from None
    except ValueError:
        pass  # it does not tell what it takes


def _listed(batch: Any) -> list[Any]:
    return list(batch) if isinstance(batch, tuple | list) else [batch]


def _as_loss(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        words = "the model gives no loss: name a loss function of (output, target) on the ranks, --loss NAME"
        raise UsageError(f"{words}. It gave {type(value).__name__}.")
    return value


def _endless(loader: Any) -> Iterator[Any]:
    yield from itertools.chain.from_iterable(itertools.repeat(loader))


def _rows(loader: Any) -> tuple[Any, Callable[[list[Any]], Any]]:
    dataset = getattr(loader, "dataset", None)
    has_rows = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)  # torch gives it to both
    if dataset is None or not has_rows or not len(dataset):
        raise UsageError(
            f"%batch_find needs a loader whose rows have numbers, not {type(loader).__name__} of a stream."
        )
    return dataset, loader.collate_fn


def _to(batch: Any, device: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict) or hasattr(batch, "items"):
        return {name: _to(value, device) for name, value in batch.items()}
    return type(batch)(_to(item, device) for item in batch) if isinstance(batch, tuple | list) else batch


def _mean(value: torch.Tensor, world_size: int) -> float:
    if world_size > 1:
        dist.all_reduce(value)
    return float(value) / world_size


def _least(value: float, world_size: int) -> float:
    if world_size == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return float(shared)


def _free_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
