"""Whether a loop keeps gradients over an optimizer's step, so that they belong to a checkpoint between two steps.

Most loops drop them, by `zero_grad()` before the next backward pass. One that does not, or that only decays them, is
told by what is there when that pass begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

_LOOKS = 8  # steps after which gradients that were always dropped are taken to be dropped


class KeptGradients:
    """What is known of each optimizer's gradients."""

    def __init__(self) -> None:
        self._kept: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._dropped: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()

    def look(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """A backward pass begins, the first since these optimizers have stepped."""
        for optimizer in list(optimizers):
            if optimizer in self._kept or self._dropped.get(optimizer, 0) >= _LOOKS:
                continue
            if any(p.grad is not None and _is_set(p.grad) for group in optimizer.param_groups for p in group["params"]):
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
