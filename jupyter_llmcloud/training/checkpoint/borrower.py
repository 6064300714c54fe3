"""The tensors of a checkpoint that is only written when a peer is lost: left where they are, and found unchanged then.

Between two steps of an optimizer nothing ordinary writes into parameters or into the optimizer's state. So the state at
the end of an iteration is there, without a copy of what is large in it, until the next step begins. That nothing has
written into it is looked at before it is used: by torch's own count of changes, and by a sample of the values, since
what is written by way of `.data` is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from jupyter_llmcloud.training.checkpoint.stager import Stager
from jupyter_llmcloud.training.object_graph import memory

SMALL = 4096  # elements: copied
_SAMPLES = 1024  # of the values of a tensor


@dataclass(frozen=True)
class _Borrowed:
    tensor: torch.Tensor
    version: int
    sample: torch.Tensor

    def is_untouched(self) -> bool:
        return self.tensor._version == self.version and torch.equal(_sample(self.tensor), self.sample)


class Borrower(Stager):
    """Copies what may change at any time, and borrows what only a step changes."""

    def __init__(self) -> None:
        super().__init__()
        self._steady: set[int] = set()
        self._borrowed: list[_Borrowed] = []

    @property
    def is_new(self) -> bool:
        """Whether nothing was ever copied or borrowed by it."""
        return super().is_new and not self._borrowed

    def begin(self, steady: Iterable[int]) -> None:
        """Another state is taken; `steady`: where memory begins that only an optimizer's step changes."""
        self._steady, self._borrowed = set(steady), []

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself where it is large and steady, otherwise a copy."""
        if tensor.numel() < SMALL or memory.start_of(tensor) not in self._steady:
            return super().copy(key, tensor)
        kept = tensor.detach()
        self._borrowed.append(_Borrowed(kept, kept._version, _sample(kept)))
        return kept

    def copy_later(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Likewise: nothing is left to be copied."""
        return self.copy(key, tensor)

    @property
    def num_bytes(self) -> int:
        """How much is borrowed."""
        return sum(each.tensor.nbytes for each in self._borrowed)

    def is_untouched(self) -> bool:
        """Whether everything that was borrowed is as it was."""
        return all(each.is_untouched() for each in self._borrowed)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some of the values, as bytes, so that what is no number equals itself."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().view(torch.uint8).clone()
