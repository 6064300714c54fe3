"""What a place hears of: every loader that is made, every pass over it, every backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader

from jupyter_llmcloud.training.resume.dataloader_tracking import TrackedIterator

if TYPE_CHECKING:
    from jupyter_llmcloud.training.resume.replay import ReplayCursor


def install(place: ReplayCursor) -> None:
    """Follow every loader of this process while a cell is followed. Called once, in a rank."""
    original_init, original_backward = DataLoader.__init__, torch.autograd.backward

    @functools.wraps(original_backward)
    def backward(*args: Any, **kwargs: Any) -> None:
        if place.follows:
            place.num_backwards += 1
            place.loops.note_backward()
        original_backward(*args, **kwargs)

    torch.autograd.backward = backward

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        place.number(self)

    __init__.__doc__ = original_init.__doc__
    DataLoader.__init__ = __init__  # type: ignore[method-assign]
    for kind in (DataLoader, DataLoaderShard, DataLoaderDispatcher):
        _follow_passes(kind, place)


def _follow_passes(kind: Any, place: ReplayCursor) -> None:
    original = kind.__iter__

    def __iter__(self: Any) -> Iterator[Any]:
        if place.is_drawing:
            return place.advanced(self, original(self))
        return TrackedIterator(place, self, original) if place.follows else original(self)

    kind.__iter__ = __iter__
