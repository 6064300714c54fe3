"""The optimizers that have stepped in a cell, and whether gradients wait for their next step.

Most loops drop gradients, by `zero_grad()` before the next backward pass. One that does not, or that only decays them,
is found out by what is there when that pass begins; its gradients belong to a checkpoint between two steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_LOOKS = 8  # steps after which, of gradients that were always dropped, only the smallest one is looked at


class SteppedOptimizers:
    """Iterates over those that are alive."""

    def __init__(self) -> None:
        self._num_backwards = 0  # how often gradients were computed
        self._num_batches = 0  # delivered
        self.clear()

    def clear(self) -> None:
        """A new cell."""
        self._backwards_at_step: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._batches_at_step = 0
        self._kept = KeptGradients()

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._backwards_at_step))

    def __contains__(self, optimizer: Any) -> bool:
        return optimizer in self._backwards_at_step

    def note_step(self, optimizer: Any) -> None:
        """One has stepped."""
        self._backwards_at_step[optimizer] = self._num_backwards
        self._batches_at_step = self._num_batches

    def note_batch(self) -> None:
        """A loader has delivered."""
        self._num_batches += 1

    def note_backward(self) -> None:
        """Gradients are about to be computed: those that are there after a step were kept over it."""
        self._kept.look(o for o, number in self._backwards_at_step.items() if number == self._num_backwards)
        self._num_backwards += 1

    @property
    def is_between_steps(self) -> bool:
        """Whether a batch has been delivered since the last step."""
        return self._num_batches > self._batches_at_step

    def may_have_gradients(self, optimizer: Any) -> bool:
        """Whether the next step of an optimizer may use gradients that are there now."""
        if self._num_backwards > self._backwards_at_step.get(optimizer, 0):
            return True
        return self._kept.may_be_of(optimizer)


class KeptGradients:
    """What is known of each optimizer's gradients."""

    def __init__(self) -> None:
        self._kept: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._dropped: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()

    def look(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """A backward pass begins, the first since these optimizers have stepped."""
        for optimizer in list(optimizers):
            if optimizer in self._kept:
                continue
            found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if found and self._dropped.get(optimizer, 0) >= _LOOKS:
                found = [min(found, key=lambda gradient: gradient.numel())]
            if any(map(_is_set, found)):
                self._kept.add(optimizer)
            else:
                self._dropped[optimizer] = self._dropped.get(optimizer, 0) + 1

    def may_be_of(self, optimizer: Any) -> bool:
        """Whether an optimizer's gradients are kept over its steps, or that is not known yet."""
        return optimizer in self._kept or optimizer not in self._dropped


def _is_set(gradient: torch.Tensor) -> bool:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    plain = local.coalesce().values() if local.is_sparse else local
    return bool(plain.any())
