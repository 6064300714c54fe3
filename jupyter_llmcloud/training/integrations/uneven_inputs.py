"""`accelerator.join_uneven_inputs` on ranks without a GPU, where Accelerate leaves it out and the ranks would wait.

What it does, by torch's `Join`, works on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from jupyter_llmcloud.training import patches

_TARGET = "accelerate:Accelerator.join_uneven_inputs"


class _OfManyDevices:
    """An Accelerator, but that it says that its processes have devices of their own."""

    multi_device = True

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


def install() -> None:
    """For every Accelerator of this process. Called once, in a rank."""

    def make(original: Callable[..., AbstractContextManager[None]]) -> Callable[..., AbstractContextManager[None]]:
        def join_uneven_inputs(
            self: Any, joinables: list[Any], even_batches: bool | None = None
        ) -> AbstractContextManager[None]:
            is_wrapped = all(isinstance(joinable, DistributedDataParallel) for joinable in joinables)
            on_cpus = self.distributed_type == DistributedType.MULTI_CPU
            return original(_OfManyDevices(self) if on_cpus and is_wrapped else self, joinables, even_batches)

        return join_uneven_inputs

    patches.UNEVEN_INPUTS.apply({_TARGET: make})
