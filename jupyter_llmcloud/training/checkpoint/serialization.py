"""Values that can be saved and loaded without running code: numbers, text, containers, tensors, generators.

`encode` turns a value into types that `torch.load(weights_only=True)` accepts and copies every tensor; `decode` is its
inverse. Raises NotPlain for anything else.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

MAX_ELEMENTS = 100_000  # of all containers of one variable together
MAX_TENSOR = 4096
_TAG = "__llmcloud__"
_SIMPLE = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device, torch.Size)
_SIMPLE_SET = frozenset(_SIMPLE)

CopyTensor = Callable[[str, torch.Tensor], torch.Tensor]


class NotPlain(TypeError):
    """The value cannot be saved without pickling code."""


def encode(value: Any, copy: CopyTensor, path: str = "") -> Any:
    """A copy of `value` in loadable types. `copy(path, tensor)` makes the copy of each tensor."""
    if isinstance(value, torch.Tensor):
        full = getattr(value, "full_tensor", None)
        if full is not None:
            raise NotPlain(f"{path or 'it'} is a sharded tensor")
        return copy(path, value)
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, np.generic):
        return {_TAG: "scalar", "dtype": value.dtype.str, "value": value.item()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {_TAG: "array", "dtype": value.dtype.str, "shape": list(value.shape), "bytes": value.tobytes()}
    return _encode_container(value, copy, path)


def _encode_container(value: Any, copy: CopyTensor, path: str) -> Any:
    if isinstance(value, dict):
        items = {_key(key, path): encode(item, copy, f"{path}.{key}") for key, item in value.items()}
        return OrderedDict(items) if isinstance(value, OrderedDict) else items
    if type(value) in (list, tuple):
        if _SIMPLE_SET.issuperset(map(type, value)):
            return type(value)(value)
        return type(value)(encode(item, copy, f"{path}.{at}") for at, item in enumerate(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return tuple(encode(item, copy, f"{path}.{at}") for at, item in enumerate(value))
    if type(value) in (set, frozenset):
        return {_TAG: type(value).__name__, "items": [encode(item, copy, path) for item in value]}
    if type(value) is deque:
        return {_TAG: "deque", "items": [encode(item, copy, path) for item in value], "maxlen": value.maxlen}
    raise NotPlain(f"{path or 'it'} holds a {type(value).__module__}.{type(value).__name__}")


def _key(key: Any, path: str) -> Any:
    if type(key) not in (int, float, str, bool, tuple, type(None)):
        raise NotPlain(f"{path or 'it'} has a key of type {type(key).__name__}")
    return key


def decode(value: Any) -> Any:
    """The value that `encode` was given."""
    if isinstance(value, dict):
        match value.get(_TAG):
            case "scalar":
                return np.dtype(value["dtype"]).type(value["value"])
            case "array":
                flat = np.frombuffer(value["bytes"], dtype=value["dtype"]).copy()
                return flat.reshape(value["shape"])
            case "set" | "frozenset" as kind:
                return {"set": set, "frozenset": frozenset}[kind](decode(item) for item in value["items"])
            case "deque":
                return deque((decode(item) for item in value["items"]), maxlen=value["maxlen"])
        return type(value)((key, decode(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(decode(item) for item in value)
    return value


def encode_variable(value: Any) -> Any:
    """A small variable of a cell: plain, short, no trained tensor; or the state of a generator. Raises NotPlain."""
    if isinstance(value, torch.Generator):
        return {_TAG: "torch.Generator", "state": value.get_state()}
    if isinstance(value, np.random.Generator):
        return {_TAG: "numpy.Generator", "state": encode(value.bit_generator.state, _small_tensor)}
    if isinstance(value, random.Random):
        return {_TAG: "random.Random", "state": value.getstate()}
    _check_size(value, [MAX_ELEMENTS])
    return encode(value, _small_tensor)


def _check_size(value: Any, left: list[int]) -> None:
    left[0] -= 1
    if isinstance(value, dict | list | tuple | set | frozenset | deque):
        left[0] -= len(value)
        if left[0] < 0:
            raise NotPlain("it is too long")
        for item in value.values() if isinstance(value, dict) else value:
            if not isinstance(item, int | float | str | bool | None):
                _check_size(item, left)
    elif isinstance(value, str | bytes | np.ndarray) and len(value) > MAX_ELEMENTS:
        raise NotPlain("it is too long")


def _small_tensor(path: str, tensor: torch.Tensor) -> torch.Tensor:
    is_trained = tensor.requires_grad and tensor.is_leaf
    if is_trained or tensor.numel() > MAX_TENSOR or type(tensor) is not torch.Tensor:
        raise NotPlain(f"{path or 'it'} is a tensor that is trained or large")
    return tensor.detach().clone()


def put_back(saved: Any, present: Any, filled: set[int]) -> tuple[bool, Any]:
    """(whether the name must be bound anew, the value): containers and generators are filled in place.

    Other variables may refer to the same list, so it is the list that must get its old items; but two names that
    share a list now need not have shared it then, so each is `filled` only once.
    """
    match saved.get(_TAG) if isinstance(saved, dict) else None:
        case "torch.Generator" | "numpy.Generator" | "random.Random" as kind:
            _set_generator(kind, saved["state"], present)
            return False, present
    value = decode(saved)
    if isinstance(value, torch.Tensor):
        return True, value.to(present.device) if isinstance(present, torch.Tensor) else value
    if isinstance(value, np.ndarray) and _is_same_memory_layout(value, present) and id(present) not in filled:
        filled.add(id(present))
        present[...] = value  # views of it see what it held
        return False, present
    if id(present) in filled or not _is_like(value, present):
        return True, value
    _fill(present, value, filled)
    return False, present


def _fill(present: Any, value: Any, filled: set[int]) -> None:
    """Dicts inside a dict are filled in place too: they may be of another kind, such as defaultdict."""
    filled.add(id(present))
    if not isinstance(present, dict):
        present.clear()
        (present.update if isinstance(present, set) else present.extend)(value)
        return
    inner = {key: item for key, item in present.items() if isinstance(item, dict) and id(item) not in filled}
    present.clear()
    for key, item in value.items():
        if isinstance(item, dict) and key in inner:
            _fill(inner[key], item, filled)
            present[key] = inner[key]
        else:
            present[key] = item


def _set_generator(kind: str, state: Any, present: Any) -> None:
    if kind == "torch.Generator" and isinstance(present, torch.Generator):
        present.set_state(state)
    elif kind == "numpy.Generator" and isinstance(present, np.random.Generator):
        present.bit_generator.state = decode(state)
    elif kind == "random.Random" and isinstance(present, random.Random):
        present.setstate(state)


def _is_same_memory_layout(value: np.ndarray, present: Any) -> bool:
    is_array = type(present) is np.ndarray and present.flags.writeable
    return is_array and present.shape == value.shape and present.dtype == value.dtype


def _is_like(value: Any, present: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(present, dict)
    if isinstance(value, deque):
        return type(present) is deque and present.maxlen == value.maxlen
    return type(value) in (list, set) and type(present) is type(value)
