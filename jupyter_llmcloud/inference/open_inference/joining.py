"""Requests that are computed in one call: their rows put together, and the outputs taken apart again."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jupyter_llmcloud.inference.open_inference.tensors import BYTES, Array, Tensor


@dataclass(frozen=True)
class Payload:
    """What a request brings.

    Attributes:
        value: arrays by name, or any JSON value.
        size: its number of rows; None when it has none.
        key: requests of the same one can be put together.
    """

    value: Any
    size: int | None = None
    key: Hashable = None

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Payload:
        """Arrays by name; BYTES are arrays of str, where they are text."""
        arrays = {name: as_array(tensor) for name, tensor in tensors.items()}
        sizes = {array.shape[0] if array.ndim else None for array in arrays.values()}
        if len(sizes) != 1 or sizes in ({None}, {0}):
            return cls(arrays)
        key = tuple((name, array.dtype.str, array.shape[1:]) for name, array in sorted(arrays.items()))
        return cls(arrays, sizes.pop(), key)

    @classmethod
    def of_json(cls, value: Any) -> Payload:
        """Any value; the items of a list are its rows."""
        return cls(value, len(value), "json") if isinstance(value, list) and value else cls(value)


def as_array(tensor: Tensor) -> Array:
    """The array of a tensor as a user's code gets it."""
    if tensor.datatype != BYTES:
        return tensor.data
    texts = np.empty(tensor.shape, dtype=object)
    for index, item in enumerate(tensor.data.flat):
        try:
            texts.flat[index] = item.decode()
        except UnicodeDecodeError:
            return tensor.data
    return texts


def groups(payloads: Sequence[Payload], max_rows: int) -> Iterator[list[int]]:
    """Which of them go together: of one key, at most `max_rows` rows unless one alone has more."""
    by_key: dict[Hashable, list[int]] = {}
    for index, payload in enumerate(payloads):
        if payload.size is None:
            yield [index]
        else:
            by_key.setdefault(payload.key, []).append(index)
    for indices in by_key.values():
        group: list[int] = []
        num_rows = 0
        for index in indices:
            size = payloads[index].size or 0
            if group and num_rows + size > max_rows:
                yield group
                group, num_rows = [], 0
            group.append(index)
            num_rows += size
        yield group


def join(payloads: Sequence[Payload]) -> Any:
    """One value of all their rows."""
    if len(payloads) == 1:
        return payloads[0].value
    first = payloads[0].value
    if isinstance(first, list):
        return [row for payload in payloads for row in payload.value]
    return {name: np.concatenate([payload.value[name] for payload in payloads]) for name in first}


def split(outputs: Any, sizes: Sequence[int]) -> list[Any]:
    """The outputs of each request. Raises ValueError when they have not as many rows as the inputs."""
    total = sum(sizes)
    if isinstance(outputs, Mapping):
        columns = {name: split(value, sizes) for name, value in outputs.items()}
        return [{name: column[index] for name, column in columns.items()} for index in range(len(sizes))]
    if isinstance(outputs, str | bytes) or not hasattr(outputs, "__len__") or len(outputs) != total:
        found = f"{len(outputs)} results" if hasattr(outputs, "__len__") else f"a {type(outputs).__name__}"
        raise ValueError(f"{total} rows were given, and {found} came back: one for each row is needed")
    ends = np.cumsum(sizes)
    return [outputs[end - size : end] for size, end in zip(sizes, ends.tolist(), strict=True)]


def as_tensors(value: Any) -> dict[str, Tensor]:
    """What a user's code returned, as outputs by name: a mapping, a table's columns, or one that is called "output".

    Raises TypeError.
    """
    if hasattr(value, "iterrows"):  # of pandas: its columns may well be of different types
        value = {str(name): value[name] for name in value.columns}
    named = value if isinstance(value, Mapping) else {"output": value}
    tensors = {}
    for name, item in named.items():
        if not isinstance(name, str):
            raise TypeError(f"an output has the name {name!r}, which is no text")
        try:
            tensors[name] = Tensor.of(name, item)
        except ValueError as error:  # rows of several lengths
            raise TypeError(f"{name!r} cannot be made an array: {error}") from None
    return tensors
