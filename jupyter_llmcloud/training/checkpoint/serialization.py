"""Values that can be saved and loaded without running code: numbers, text, containers, tensors, generators.

`encode` turns a value into types that `torch.load(weights_only=True)` accepts and copies every tensor; `decode` is its
inverse. Raises NotPlain for anything else.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

_PROBE = 1 << 20  # bytes
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


def save(value: Any, path: Path) -> None:
    """As torch.save, but equal values make equal files: torch writes a file's own name into it.

    With the error of the operating system: torch says "unexpected pos" where a disk is full.
    """
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError:
        with path.open("ab", buffering=0) as file:
            file.write(bytes(_PROBE))
            os.fsync(file.fileno())
        raise


def load(source: Path | BinaryIO) -> dict[str, Any]:
    """What was saved. `bytes` without any are written as a call of their class, which torch asks to be told of."""
    with torch.serialization.safe_globals([bytes]):
        loaded: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True)
    return loaded
