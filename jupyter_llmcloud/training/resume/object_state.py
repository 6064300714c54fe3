"""Objects of the user's own classes, and what else changes beside variables: found, compared, saved, put back.

A loop often keeps its state in attributes: a meter, an average of the weights, a class with `fit()`. Of every such
object the attributes that have changed since the training began are part of a checkpoint. What has changed and cannot
be saved is refused: a resumed cell would otherwise go on with less than it had.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.serialization import CopyTensor, NotPlain, encode, encode_variable, put_back
from jupyter_llmcloud.training.resume.change_detection import (
    CONTAINERS,
    Identity,
    Marks,
    has_opaque_state,
    identity,
    is_own,
    mark,
)
from jupyter_llmcloud.training.resume.frame_variables import is_users

_MAX_DEPTH = 4
_MAX_ITEMS = 64  # of a container that is looked into
LARGE = torch.Tensor | np.ndarray | CONTAINERS
_MAX_REPLACED = 1 << 16  # elements of a tensor that is made anew in every turn


def walk(frames: list[FrameType], given: set[str]) -> dict[str, Any]:
    """The objects of own classes that the variables lead to, by address."""
    found: dict[str, Any] = {}
    for address, value in variables_of(frames, given):
        _walk(value, address, 0, found, set())
    return found


def variables_of(frames: list[FrameType], given: set[str]) -> Iterator[tuple[str, Any]]:
    """Address and value of every variable that may hold something to save."""
    for depth, frame in enumerate(frames):
        for name, value in list(frame.f_locals.items()):
            if is_users(name) and name not in given and not isinstance(value, type):
                yield f"{depth} {name}", value


def _walk(value: Any, address: str, depth: int, found: dict[str, Any], seen: set[int]) -> None:
    if depth > _MAX_DEPTH or id(value) in seen or isinstance(value, Trainer | TrainerCallback):
        return
    seen.add(id(value))
    items: Iterator[tuple[str, Any]] = iter(())
    if is_own(value):
        found[address] = value
        items = ((f".{name}", item) for name, item in list(vars(value).items()))
    elif isinstance(value, dict) and len(value) <= _MAX_ITEMS:
        items = ((f"[{key!r}]", item) for key, item in list(value.items()))
    elif isinstance(value, list | tuple) and len(value) <= _MAX_ITEMS:
        items = ((f"[{at}]", item) for at, item in enumerate(value))
    for name, item in items:
        if is_own(item) or isinstance(item, dict | list | tuple):
            _walk(item, address + name, depth + 1, found, seen)


def stateful(objects: dict[str, Any]) -> dict[str, Any]:
    """Attributes with a state of their own: modules, optimizers, schedulers."""
    return {
        f"{address}.{name}": item
        for address, value in objects.items()
        for name, item in list(vars(value).items())
        if not name.startswith("_") and callable(getattr(type(item), "state_dict", None))
    }


def add_marks(
    marks: Marks, frames: list[FrameType], given: set[str], objects: dict[str, Any], table: dict[str, Any]
) -> None:
    """Remember how everything that is new is now: variables, attributes of `objects`, the states in `table`."""
    for address, value in variables_of(frames, given):
        if (isinstance(value, LARGE) or has_opaque_state(value)) and address not in marks:
            marks[address] = (identity(value), mark(value))
    for address, value in objects.items():
        for name, item in list(vars(value).items()):
            if (path := f"{address}.{name}") not in marks:
                marks[path] = (identity(item), mark(item))
    for address, value in table.items():
        if (path := f"state {address}") not in marks:
            marks[path] = (identity(value), state_mark(value))


def state_mark(value: Any) -> Any:
    """The mark of the state of something with state_dict()."""
    if isinstance(value, torch.nn.Module):
        return mark(value)
    try:
        return mark(value.state_dict())
    except Exception:
        return None  # an object that is not ready yet; it is looked at when it has a state


def has_changed(value: Any, address: str, first: Marks) -> bool:
    """Whether the state of something in the table is another than when the training began."""
    known = first.get(f"state {address}")
    return known is None or known[1] != state_mark(value)


def take_attributes(objects: dict[str, Any], first: Marks, copy: CopyTensor) -> dict[str, dict[str, Any]]:
    """The attributes that have changed, by address; raises NotPlain for one that cannot be saved."""
    taken: dict[str, dict[str, Any]] = {}
    for address, value in objects.items():
        for name, item in list(vars(value).items()):
            path = f"{address}.{name}"
            if (known := first.get(path)) is not None and known[1] == mark(item):
                continue
            if isinstance(value, Dataset) and isinstance(item, torch.Tensor | CONTAINERS | tuple):
                continue  # what a data set has read or cached it can read again
            try:
                taken.setdefault(address, {})[name] = _encoded(item, _Copy(copy), f"attribute {path}")
            except NotPlain as error:
                _refuse_when_kept(item, known, path, error)
    return taken


def take_large(
    frames: list[FrameType], given: set[str], small: dict[str, Any], first: Marks, copy: CopyTensor, limit: int
) -> dict[str, Any]:
    """Variables that have changed and are not among the `small` ones; raises NotPlain for one that cannot be saved.

    What is made anew in every turn, such as a batch, is left out when it has more than `limit` elements.
    """
    taken: dict[str, Any] = {}
    for address, value in variables_of(frames, given):
        known = first.get(address)
        if address in small or not (isinstance(value, LARGE) or has_opaque_state(value)):
            continue
        if known is not None and known[1] == mark(value):
            continue
        kept = known is not None and known[0]() is value
        if not kept and isinstance(value, np.ndarray) and value.size > limit:
            continue
        try:
            taken[address] = encode(value, _Copy(copy, None if kept else limit), f"variable {address}")
        except NotPlain as error:
            _refuse_when_kept(value, known, address, error)
    return taken


class _Copy:
    """Copies tensors, but for those that are trained, and not more than `limit` elements."""

    def __init__(self, copy: CopyTensor, limit: int | None = None) -> None:
        self._copy = copy
        self._left = limit

    def __call__(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad and tensor.is_leaf:
            raise NotPlain("it holds a tensor that is trained")
        if self._left is not None:
            self._left -= tensor.numel()
            if self._left < 0:
                raise NotPlain("it is too large")
        return self._copy(path, tensor)


def _encoded(value: Any, copy: CopyTensor, path: str) -> Any:
    if isinstance(value, LARGE | tuple):
        return encode(value, copy, path)
    return encode_variable(value)


def _refuse_when_kept(value: Any, known: tuple[Identity, Any] | None, path: str, error: NotPlain) -> None:
    if known is None or known[0]() is not value or not (isinstance(value, LARGE) or has_opaque_state(value)):
        return
    name = path.partition(" ")[2] or path
    raise NotPlain(
        f"{name!r} has changed since the training began, and {error}, which cannot be saved: a resumed cell would go "
        "on without it. Keep tensors and numbers in it, or give it a name of its own and hand it to run.checkpoint()"
    ) from None


def unmarked(taken: dict[str, dict[str, Any]], first: Marks, always: list[str]) -> list[str]:
    """Attributes that were not there when the training began: the training may have changed them, or just the rank."""
    paths = [f"{address}.{name}" for address, attributes in taken.items() for name in attributes]
    return [path for path in paths if path not in first and path not in always]


def put_attributes(saved: dict[str, dict[str, Any]], objects: dict[str, Any], left_out: Collection[str] = ()) -> None:
    """Put attributes back."""
    filled: set[int] = set()
    for address, attributes in saved.items():
        if address not in objects:
            raise ResumeMissed(f"the checkpoint holds attributes of {address!r}, but the cell has made no such object.")
        target = objects[address]
        for name, value in attributes.items():
            if f"{address}.{name}" in left_out:
                continue
            anew, item = put_back(value, vars(target).get(name), filled)
            if anew:
                setattr(target, name, item)
