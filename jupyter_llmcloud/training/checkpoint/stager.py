"""Copies of tensors for a checkpoint: made while the cell waits, or by a thread before the next optimizer step."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

_SMALL = 4096  # elements: copied at once
_LOOK_S = 0.1


class Stager:
    """Copies tensors into memory that is kept for the next checkpoint: fresh pages would cost most of the time."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._later: list[tuple[torch.Tensor, torch.Tensor]] = []  # (buffer, tensor)
        self._copied = threading.Event()
        self._copied.set()

    @property
    def is_new(self) -> bool:
        """Whether nothing was ever copied by it."""
        return not self._buffers and self._copied.is_set()

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, in the buffer of this key."""
        return self._buffer(key, tensor).copy_(tensor.detach())

    def copy_later(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Where a copy will be when what `hand_over` returns was called; of a small tensor it is there at once."""
        if tensor.numel() < _SMALL:
            return self.copy(key, tensor)
        buffer = self._buffer(key, tensor)
        self._later.append((buffer, tensor.detach()))
        return buffer

    def _buffer(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pin = tensor.device.type == "cuda"
            buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
        return buffer

    def hand_over(self) -> Callable[[], None]:
        """What makes the copies that are left, in a thread; until then no optimizer may step."""
        later, self._later = self._later, []
        copied = self._copied
        copied.clear()

        def finish() -> None:
            try:
                for buffer, tensor in later:
                    buffer.copy_(tensor)
                later.clear()
            finally:
                copied.set()

        return finish

    def discard(self) -> None:
        """The copies that are left are needed no more."""
        self._later = []

    def wait(self, is_copying: Callable[[], bool]) -> None:
        """Return when all copies are made, or when nobody makes them: an interrupt came before a thread could begin."""
        while not self._copied.wait(_LOOK_S):
            if not is_copying():
                self._copied.set()
