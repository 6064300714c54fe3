"""What the user's own samplers and streams have counted when a pass over their loader begins.

A sampler that counts its passes, or draws from generators of its own, makes another order in each pass. Its state as it
is now does not lead back to the order of the pass that is under way: that is decided by how it was when the pass began.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from jupyter_llmcloud.training.checkpoint import rng
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.serialization import NotPlain, decode, encode
from jupyter_llmcloud.training.object_graph.kinds.base import SIMPLE, is_hidden, visible
from jupyter_llmcloud.training.resume.user_code import is_own_module

_DEPTH = 3  # objects within objects
_MOST_BYTES = 1 << 20  # of an array: more is data, not what was counted
_MOST_ITEMS = 1_000_000
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_NUMPY = (np.random.Generator, np.random.RandomState)


def parts_of(loader: Any) -> list[Any]:
    """The samplers of a loader, and the stream that it reads, which are of classes of the user's own."""
    parts = rng.parts_of(loader)
    streams = [part.dataset for part in parts if isinstance(getattr(part, "dataset", None), IterableDataset)]
    inner = [source for stream in streams if (source := getattr(stream, "dataset", None)) is not None]
    found: list[Any] = []
    for part in (*parts, *streams, *inner):
        if is_own_module(str(type(part).__module__)) and all(part is not other for other in found):
            found.append(part)
    return found


def state_of(loader: Any) -> list[dict[str, Any]]:
    """What each of these parts has counted, in loadable values."""
    return [_state(part, 0, set()) for part in parts_of(loader)]


def put(loader: Any, states: list[dict[str, Any]]) -> None:
    """Be as `state_of` told. Raises ResumeMissed where the loader is made of other parts."""
    parts = parts_of(loader)
    if len(parts) != len(states):
        raise ResumeMissed(f"the loader had {len(states)} samplers or streams of the cell's own, now {len(parts)}.")
    for part, state in zip(parts, states, strict=True):
        _put(part, state)


def _state(owner: Any, depth: int, seen: set[int]) -> dict[str, Any]:
    seen.add(id(owner))
    found: dict[str, Any] = {}
    for name, item in visible(owner):
        if isinstance(item, random.Random):
            found[name] = {"random": item.getstate()}
        elif isinstance(item, _NUMPY):
            found[name] = {"numpy": encode(_bits(item).state, _copy)}
        elif isinstance(item, torch.Generator):
            found[name] = {"torch": item.get_state()}
        elif _is_counted(item):
            try:
                found[name] = {"value": encode(item, _copy)}
            except NotPlain:
                continue
        elif _is_looked_into(item) and depth < _DEPTH and id(item) not in seen:
            found[name] = {"object": _state(item, depth + 1, seen)}
    return found


def _is_counted(item: Any) -> bool:
    if isinstance(item, torch.Tensor | np.ndarray):
        return int(item.nbytes) <= _MOST_BYTES
    return type(item) in SIMPLE or (type(item) in _CONTAINERS and len(item) <= _MOST_ITEMS)


def _is_looked_into(item: Any) -> bool:
    return is_own_module(str(type(item).__module__)) and not isinstance(item, Dataset | type | torch.nn.Module)


def _bits(numbers: Any) -> Any:
    return numbers.bit_generator if isinstance(numbers, np.random.Generator) else numbers._bit_generator


def _copy(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _put(owner: Any, state: dict[str, Any]) -> None:
    present = dict(visible(owner))
    for name, saved in state.items():
        [(kind, value)] = saved.items()
        item = present.get(name)
        if kind == "value":
            _put_value(owner, name, item, decode(value))
        elif kind == "object" and item is not None:
            _put(item, value)
        elif kind == "random" and isinstance(item, random.Random):
            version, numbers, gauss = value
            plain = numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers
            item.setstate((version, tuple(plain), gauss))
        elif kind == "numpy" and isinstance(item, _NUMPY):
            _bits(item).state = decode(value)
        elif kind == "torch" and isinstance(item, torch.Generator):
            item.set_state(value)
    for name in present.keys() - state.keys():
        if _is_counted(present[name]) and not is_hidden(owner, name) and name in getattr(owner, "__dict__", ()):
            _forget(owner, name)


def _put_value(owner: Any, name: str, item: Any, value: Any) -> None:
    """In place, so that everybody who knows a container finds the same one."""
    if type(item) in (list, deque) and type(item) is type(value) and getattr(item, "maxlen", 0) in (None, 0, value):
        item.clear()
        item.extend(value)
    elif type(item) in (dict, set) and type(item) is type(value):
        item.clear()
        item.update(value)
    elif isinstance(item, torch.Tensor) and item.shape == value.shape and item.dtype == value.dtype:
        with torch.no_grad():
            item.copy_(value)
    else:
        object.__setattr__(owner, name, value)


def _forget(owner: Any, name: str) -> None:
    """It came later."""
    try:
        object.__delattr__(owner, name)
    except (AttributeError, TypeError):
        return
