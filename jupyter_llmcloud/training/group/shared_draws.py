"""Random numbers of ranks that compute one batch together: what a cell draws for the batch is the same on all of them.

A cell may cut its batches by hand (`torch.randint`), mask tokens or mix rows while it trains. With other numbers on
each rank the first stage of a pipeline would take the inputs of one batch, and the last one the labels of another.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from jupyter_llmcloud.training.checkpoint import rng


def draw_alike(data_rank: int) -> None:
    """From now on the generators of ranks with this share of the data are those of the first one. All must call it."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (data_rank, rng.snapshot()))
    rng.restore(next(state for share, state in told if share == data_rank))


@contextlib.contextmanager
def drawing_apart(rank: int, device: torch.device) -> Iterator[None]:
    """Within the block each rank draws for its own part of the model, behind it all draw alike again.

    All ranks must come to its end. Where none has drawn anything, nothing has changed; as in one process.
    """
    before = _states(device)
    _begin(rank, device, before)
    begun = _states(device)
    try:
        yield
        has_drawn = any(not torch.equal(one, now) for one, now in zip(begun, _states(device), strict=True))
    finally:
        _put(device, before)
    found = torch.tensor(int(has_drawn), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if found.item():
        torch.rand(())  # the next batch drops otherwise
        if device.type == "cuda":
            torch.rand((), device=device)


def _states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _put(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _begin(rank: int, device: torch.device, states: list[torch.Tensor]) -> None:
    """Layers of two stages are not to drop the same; the first stage goes on as a process alone would."""
    if not rank:
        return
    told = b"".join([*(bytes(state.numpy()) for state in states), str(rank).encode()])
    seed = int.from_bytes(hashlib.blake2b(told, digest_size=7).digest(), "little")
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
