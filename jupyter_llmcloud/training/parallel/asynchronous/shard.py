"""A part of a model on its parameter server, with the outer optimizer's state.

What a worker has moved by is the gradient of an outer step. Momentum is Nesterov's, but applied once for as many
arrivals as there are workers: momentum on every stale arrival makes training worse (Delayed Nesterov, arXiv 2401.09135,
section 5.1). Where all workers arrive once a round this is DiLoCo's outer step.
"""

from __future__ import annotations

import threading

import torch


class ParameterShard:
    """Some of a model's values, flat, float32, on the CPU.

    Args:
        values: as training begins.
        learning_rate, momentum: of the outer optimizer.

    Attributes:
        num_arrived: updates so far; the version of the values.
    """

    def __init__(self, values: torch.Tensor, learning_rate: float, momentum: float) -> None:
        self._lock = threading.Lock()
        self._learning_rate, self._momentum_factor = learning_rate, momentum
        self.restart(values)

    def restart(self, values: torch.Tensor) -> None:
        """Begin with these values."""
        with self._lock:
            self._values = values.detach().to("cpu", torch.float32, copy=True)
            self._momentum = torch.zeros_like(self._values)
            self._gathered = torch.zeros_like(self._values)
            self._num_gathered = 0
            self.num_arrived = 0

    def apply(self, moved: torch.Tensor, num_workers: int) -> None:
        """A worker has moved by this, against the gradient; it is one of so many."""
        with self._lock:
            share = moved / num_workers
            self._values.sub_(share, alpha=self._learning_rate)
            self._gathered += share
            self._num_gathered += 1
            self.num_arrived += 1
            if self._num_gathered >= num_workers:
                self._momentum.mul_(self._momentum_factor).add_(self._gathered)
                self._values.sub_(self._momentum, alpha=self._learning_rate * self._momentum_factor)
                self._gathered.zero_()
                self._num_gathered = 0

    def values(self) -> torch.Tensor:
        """A copy of the values as they are now."""
        with self._lock:
            return self._values.clone()

    def state(self) -> dict[str, torch.Tensor | int]:
        """What a checkpoint holds of it."""
        with self._lock:
            return {
                "values": self._values.clone(),
                "momentum": self._momentum.clone(),
                "gathered": self._gathered.clone(),
                "num_gathered": self._num_gathered,
                "num_arrived": self.num_arrived,
            }

    def put(self, state: dict[str, torch.Tensor | int]) -> None:
        """The inverse of `state`."""
        with self._lock:
            for name, own in (("values", self._values), ("momentum", self._momentum), ("gathered", self._gathered)):
                saved = state[name]
                assert isinstance(saved, torch.Tensor)
                own.copy_(saved)
            self._num_gathered, self.num_arrived = int(state["num_gathered"]), int(state["num_arrived"])
