"""The random number generators of a rank: taken as a value, put back."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

_MANY = 500


def snapshot() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and the current GPU's generators; taken often, so as they come."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        state["numpy"] = numpy.random.get_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def loadable(value: Any) -> Any:
    """The same with every snapshot inside it in types that load without pickle."""
    if isinstance(value, dict):
        return {key: loadable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        if len(value) > _MANY and all(type(item) is int for item in value):
            return torch.tensor(value)
        return type(value)(loadable(item) for item in value)
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray):
        return torch.from_numpy(value.astype("int64"))
    return value


def restore(state: dict[str, Any]) -> None:
    """Put back what `snapshot` took, or what `loadable` made of it."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.asarray(keys).astype("uint32"), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def restore_for_new_rank(state: dict[str, Any], rank: int) -> None:
    """Generators for a rank that the saved world did not have: derived from another's, yet different."""
    restore(state)
    seed = (int(torch.randint(2**31, ())) + rank) % 2**31
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def parts_of(loader: Any) -> list[Any]:
    """A loader, its inner loader, its samplers, and theirs; outermost first."""
    parts: list[Any] = []
    pending: list[Any] = [loader]
    while pending and len(parts) < 20:
        item = pending.pop(0)
        if item is not None and all(item is not part for part in parts):
            parts.append(item)
            pending += [getattr(item, name, None) for name in ("base_dataloader", "batch_sampler", "sampler")]
    return parts


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that decide the order of a loader, outermost first."""
    found: list[torch.Generator] = []
    for part in parts_of(loader):
        for name in ("generator", "synchronized_generator"):
            generator = getattr(part, name, None)
            if isinstance(generator, torch.Generator) and all(generator is not other for other in found):
                found.append(generator)
    return found
