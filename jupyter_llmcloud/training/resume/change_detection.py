"""What tells whether a value has changed since: its identity, and a small copy or sample of what it holds."""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.training.resume.user_code import is_own_module

Identity = Callable[[], Any]
Marks = dict[str, tuple[Identity, Any]]
_MAX_ELEMENTS = 20_000  # of a container with all that is inside
_LIGHT = 4096  # elements of a tensor
_SAMPLE = 16  # elements of a tensor
_SIMPLE = int | float | complex | str | bytes | bool | None
CONTAINERS = dict | list | set | deque


def identity(value: Any) -> Identity:
    """Tells later whether something is this very object, without keeping a batch or its results in memory."""
    try:
        return weakref.ref(value)
    except TypeError:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if items is None or any(isinstance(item, torch.Tensor) and item.numel() > _LIGHT for item in items):
        return _nothing
    return lambda: value


def _nothing() -> None:
    return None


def mark(value: Any) -> Any:
    """Differs when the value does. Of a tensor some elements are looked at: training changes all of them."""
    return _mark(value, [_MAX_ELEMENTS])


def _mark(value: Any, left: list[int]) -> Any:
    left[0] -= 1
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, torch.Tensor):
        if value.requires_grad and value.is_leaf:
            return ("parameter", id(value))  # its value belongs to the module or the optimizer that has it
        return ("tensor", tuple(value.shape), _sample([value]))
    if isinstance(value, np.ndarray):
        return ("array", value.shape, value.ravel()[:: max(1, value.size // _SAMPLE)][:_SAMPLE].tobytes())
    if isinstance(value, torch.nn.Module):
        return ("module", _sample([*value.parameters(), *value.buffers()]))
    if isinstance(value, torch.Generator):
        return ("generator", bytes(value.get_state().numpy()))
    if isinstance(value, np.random.Generator):
        return ("generator", str(value.bit_generator.state))
    if isinstance(value, random.Random):
        return ("generator", value.getstate())
    if isinstance(value, CONTAINERS | tuple | frozenset):
        return _mark_container(value, left)
    return "own" if is_own(value) else id(value)


def _mark_container(value: Any, left: list[int]) -> Any:
    if len(value) > left[0]:
        return (id(value), len(value))
    if isinstance(value, Mapping):
        return [(key if isinstance(key, _SIMPLE) else id(key), _mark(item, left)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return frozenset(item if isinstance(item, _SIMPLE) else id(item) for item in value)
    return [_mark(item, left) for item in value]


def _sample(tensors: list[torch.Tensor]) -> bytes:
    parts: dict[torch.device, list[torch.Tensor]] = {}
    with torch.no_grad():
        for tensor in tensors:
            local = getattr(tensor, "to_local", None)
            plain = (local() if local is not None else tensor).detach()
            if plain.numel() and not plain.is_sparse and not plain.is_meta:
                flat = plain.reshape(-1) if plain.is_contiguous() else plain[:1].reshape(-1)
                some = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
                flat = torch.view_as_real(some).reshape(-1) if some.is_complex() else some
                parts.setdefault(some.device, []).append(flat.double())
        return b"".join(torch.cat(part).cpu().numpy().tobytes() for part in parts.values())


def is_own(value: Any) -> bool:
    """Whether it is an instance of a class of the user's own code, whose attributes can be looked at."""
    kind = type(value)
    return (
        is_own_module(kind.__module__)
        and hasattr(value, "__dict__")
        and not isinstance(value, torch.nn.Module | torch.Tensor | BaseException | type | _SIMPLE)
    )
