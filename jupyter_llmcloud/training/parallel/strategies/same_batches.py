"""Ranks that compute one batch together are to be given one batch: of different ones they would compute nothing true.

Loaders that Accelerate prepares, and `lc.data.load`, see to it. A cell may take its rows itself, by `rank` say, and
layers cut over two ranks then add up the parts of two batches, without a word.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.parallel.strategies.base import Strategy

_Told = tuple[str, tuple[int, ...], Any]  # name, shape, and of integers a hash, of other numbers two sums


class SameBatches:
    """Compares what a model is called with between the ranks that share a batch.

    Not in each call, which would wait for all: in the first of a cell, and after twice as many each time; of those with
    gradients and those without. All ranks call as often.

    Args:
        plan: in words.
        copies: how many neighbouring ranks have the same data.
    """

    def __init__(self, plan: str, copies: int) -> None:
        self._plan, self._copies = plan, copies
        self._num_calls: dict[bool, int] | None = None  # None between cells

    def begin(self) -> None:
        """A cell begins, on all ranks."""
        self._num_calls = {True: 0, False: 0}

    def close(self) -> None:
        """It has ended."""
        self._num_calls = None

    def __deepcopy__(self, memo: Any) -> SameBatches:
        return self

    def __reduce__(self) -> Any:
        return SameBatches, (self._plan, self._copies)

    def look(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A model is called (a hook of modules). Raises UsageError on every rank that shares its batch with others."""
        if torch.compiler.is_compiling() or self._num_calls is None:
            return
        named = {**{f"argument {at + 1}": value for at, value in enumerate(args)}, **kwargs}
        tensors = [(name, tensor) for name, value in named.items() for tensor in _tensors(value)]
        if any(type(tensor) is not torch.Tensor for _, tensor in tensors):
            return  # fake ones, of which nothing is computed
        mode = torch.is_grad_enabled()
        self._num_calls[mode] += 1
        if not self._num_calls[mode] & (self._num_calls[mode] - 1):
            self._compare([_told(name, tensor) for name, tensor in tensors])

    def _compare(self, own: list[_Told]) -> None:
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        first = dist.get_rank() // self._copies * self._copies
        for other in range(first + 1, first + self._copies):
            if name := differing(every[first], every[other]):
                raise UsageError(
                    f"--plan {self._plan}: ranks {first} to {first + self._copies - 1} compute one batch together, and "
                    f"the model was called with another {name} on rank {other} than on rank {first}. Loaders that "
                    "accelerator.prepare() was given deliver one batch to them. Where the cell takes rows by rank, let "
                    f"it take them by rank // {self._copies} of world_size // {self._copies}."
                )


def differing(one: list[_Told], other: list[_Told]) -> str:
    """The name of the first tensor that is another one; "" when all are the same."""
    for (name, shape, content), (other_name, other_shape, other_content) in zip(one, other, strict=False):
        if (name, shape) != (other_name, other_shape) or not _is_alike(content, other_content):
            return name
    longer = max(one, other, key=len)[min(len(one), len(other)) :]
    return longer[0][0] if longer else ""


def _is_alike(content: Any, other: Any) -> bool:
    if not (isinstance(content, tuple) and isinstance(other, tuple)):
        return bool(content == other)
    scale = max(abs(content[1]), abs(other[1]))
    # What each rank has computed itself differs in its last digits on devices of different kinds.
    pairs = zip(content, other, strict=True)
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6 * scale) or str(a) == str(b) for a, b in pairs)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def _told(name: str, tensor: torch.Tensor) -> _Told:
    found = tensor.detach()
    if found.is_floating_point() or found.is_complex():
        real = torch.view_as_real(found) if found.is_complex() else found
        return (
            name,
            tuple(found.shape),
            (float(real.sum(dtype=torch.float64)), float(real.abs().sum(dtype=torch.float64))),
        )
    data = found.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return name, tuple(found.shape), hashlib.blake2b(data, digest_size=8).digest()


class SharingStrategy(Strategy):
    """A plan under which neighbouring ranks compute one batch together: they are to be given one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._batches = SameBatches(self.plan.text, self.plan.sizes[0])

    def begin(self, cell_key: str) -> None:
        self._batches.begin()

    def close(self) -> None:
        self._batches.close()
