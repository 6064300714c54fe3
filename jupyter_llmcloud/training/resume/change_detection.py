"""What tells whether a value has changed since: its identity, and a digest of all that it holds."""

from __future__ import annotations

import itertools
import pickle
import random
import secrets
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.training.object_graph.digest import digest_bytes
from jupyter_llmcloud.training.resume.user_code import is_own_module

Identity = Callable[[], Any]
Marks = dict[str, tuple[Identity, Any]]
_MAX_ELEMENTS = 20_000  # of a container with all that is inside, looked at one by one
_LIGHT = 4096  # elements of a tensor
_SIMPLE = int | float | complex | str | bytes | bool | None
CONTAINERS = dict | list | set | deque


def identity(value: Any) -> Identity:
    """Tells later whether something is this very object, without keeping a batch or its results in memory."""
    try:
        return weakref.ref(value)
    except TypeError:
        if has_opaque_state(value):
            return lambda: value
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if items is None or any(isinstance(item, torch.Tensor) and item.numel() > _LIGHT for item in items):
        return _nothing
    return lambda: value


def _nothing() -> None:
    return None


def mark(value: Any) -> Any:
    """Differs when the value does: tensors and arrays are compared whole."""
    return _mark(value, [_MAX_ELEMENTS])


def _mark(value: Any, left: list[int]) -> Any:
    left[0] -= 1
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, torch.Tensor):
        if value.requires_grad and value.is_leaf:
            return ("parameter", id(value))  # its value belongs to the module or the optimizer that has it
        return ("tensor", tuple(value.shape), _digest([value]))
    if isinstance(value, np.ndarray):
        return ("array", value.shape, _digest_array(value, left))
    if isinstance(value, torch.nn.Module):
        return ("module", _digest([*value.parameters(), *value.buffers()]))
    if isinstance(value, torch.Generator):
        return ("generator", bytes(value.get_state().numpy()))
    if isinstance(value, np.random.Generator):
        return ("generator", str(value.bit_generator.state))
    if isinstance(value, random.Random):
        return ("generator", value.getstate())
    if isinstance(value, CONTAINERS | tuple | frozenset):
        return _mark_container(value, left)
    if has_opaque_state(value):
        return ("pickled", _pickled(value))
    return "own" if is_own(value) else id(value)


def _mark_container(value: Any, left: list[int]) -> Any:
    if len(value) > left[0]:
        return ("long", len(value), _pickled(value))
    if isinstance(value, Mapping):
        return [(key if isinstance(key, _SIMPLE) else id(key), _mark(item, left)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return frozenset(item if isinstance(item, _SIMPLE) else id(item) for item in value)
    return [_mark(item, left) for item in value]


def _digest(tensors: list[torch.Tensor]) -> list[bytes]:
    with torch.no_grad():
        return [_digest_tensor(tensor) for tensor in tensors]


def _digest_tensor(tensor: torch.Tensor) -> bytes:
    local = getattr(tensor, "to_local", None)
    plain = (local() if local is not None else tensor).detach()
    if plain.is_meta:
        return b""
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain.resolve_neg()
    return digest_bytes(plain.contiguous().reshape(-1).view(torch.uint8))


def _digest_array(value: np.ndarray, left: list[int]) -> Any:
    if value.dtype.hasobject:
        return _mark_container(value.ravel().tolist(), left)
    return digest_bytes(np.ascontiguousarray(value).reshape(-1).view(np.uint8))


def has_opaque_state(value: Any) -> bool:
    """Whether something changes in place and shows no attributes: a table, an iterator, an object with slots."""
    kind = type(value)
    if isinstance(value, type) or callable(value):
        return False
    if kind.__module__.partition(".")[0] == "pandas" or isinstance(value, itertools.count):
        return True
    return is_own_module(kind.__module__) and not hasattr(value, "__dict__")


def _pickled(value: Any) -> bytes:
    """A digest of the pickled value. What cannot be pickled has never the same twice, so that it counts as changed."""
    try:
        data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception:
        return secrets.token_bytes(16)
    return digest_bytes(np.frombuffer(data, np.uint8))


def is_own(value: Any) -> bool:
    """Whether it is an instance of a class of the user's own code, whose attributes can be looked at."""
    kind = type(value)
    return (
        is_own_module(kind.__module__)
        and hasattr(value, "__dict__")
        and not isinstance(value, torch.nn.Module | torch.Tensor | BaseException | type | _SIMPLE)
    )
