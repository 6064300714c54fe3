"""Other weights for a model that is served: loaded and checked beside it, then copied between two steps.

The new weights are loaded as any model is, with every check, while the engine goes on. Only the copy, which takes as
long as it takes to read the weights once, is done while nobody computes. For that time there are two copies in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model


@runtime_checkable
class TakesWeights(Protocol):
    """An engine whose model may change while it is open."""

    async def change_weights(self, change: Callable[[], None]) -> None:
        """Call `change`, in a thread, between two steps; what depends on the weights is made anew after it.

        Keys and values of before are dropped: sequences that go on are read again with the new weights, or end first.
        """
        ...


async def take_weights(
    loaded: LoadedModel, engine: Any, folder: str, still: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
) -> None:
    """Answer with the weights in `folder` from now on; raises ModelError, and then nothing has changed.

    Inside of what `still` gives nobody but the engine computes with them.
    """
    if not isinstance(engine, TakesWeights):
        raise ModelError(f"the {engine.name} engine takes no other weights while it is open.")
    other = await asyncio.to_thread(_load, loaded, folder)
    async with still():
        await engine.change_weights(lambda: _copy(loaded.model, other))


def _load(loaded: LoadedModel, folder: str) -> dict[str, torch.Tensor]:
    """The state of the model in `folder`, as it fits into the one that is served."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    other = load_model(folder, dtype=dtype, device=str(loaded.model.device))
    state, own = other.model.state_dict(), loaded.model.state_dict()
    unlike = [name for name in own.keys() | state.keys() if _shape(own.get(name)) != _shape(state.get(name))]
    if unlike:
        name = min(unlike)
        raise ModelError(
            f"{folder} has {name} of the shape {_shape(state.get(name))}, what is served {_shape(own.get(name))}."
        )
    return dict(state)


def _shape(value: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _copy(model: Any, state: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(state[name])
