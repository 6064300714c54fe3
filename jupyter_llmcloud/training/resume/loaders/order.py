"""What decides the order in which a loader delivers: its epoch, its generators, and how many samples a batch has."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import Sampler

from jupyter_llmcloud.training.checkpoint import rng
from jupyter_llmcloud.training.data.rank_loader import RankLoader


def order_of(loader: Any) -> dict[str, Any]:
    """The epoch and the generators of a loader."""
    generators = [generator.get_state() for generator in rng.generators_of(loader)]
    epochs = [sampler.epoch for sampler in _with_epoch(loader)]
    return {"iteration": getattr(loader, "iteration", None), "generators": generators, "epochs": epochs}


def set_order(loader: Any, order: dict[str, Any]) -> None:
    """The epoch and the generators of a loader as they were."""
    if order.get("iteration") is not None and hasattr(loader, "iteration"):
        loader.iteration = order["iteration"]
    for generator, value in zip(rng.generators_of(loader), order.get("generators", ()), strict=False):
        generator.set_state(value)
    for sampler, epoch in zip(_with_epoch(loader), order.get("epochs", ()), strict=False):
        sampler.epoch = epoch


def _with_epoch(loader: Any) -> list[Any]:
    """Samplers that are given the epoch, like DistributedSampler."""
    parts = rng.parts_of(loader)
    return [part for part in parts if isinstance(part, Sampler) and isinstance(getattr(part, "epoch", None), int)]


def batch_size(loader: Any) -> int:
    """Samples of one batch over all ranks; 0 when it is not known."""
    if isinstance(loader, range):
        return 1
    try:
        if isinstance(loader, RankLoader) or type(loader) in (DataLoaderShard, DataLoaderDispatcher):
            return int(loader.total_batch_size)
        world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return int(loader.batch_size) * world_size
    except (AttributeError, TypeError):
        return 0


def num_rows(loader: Any) -> int | None:
    """Of the data set that a loader reads; None where that has no length."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None
