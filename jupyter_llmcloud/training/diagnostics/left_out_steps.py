"""After a rollback (`--watch loss-spike=rollback`): the optimizer steps that led to the alert change nothing.

The cell draws their batches and computes with them as ever, so that its loop, its schedule and its numbers of steps are
what they would be. Their gradients are dropped before the step, and what a forward pass changes by itself, the running
statistics of normalisation layers, is put back. Every rank counts the same steps, so none needs to be asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from jupyter_llmcloud.protocol.agent_messages import Execute

_Hooked = tuple[tuple[Any, ...], dict[str, Any]]


class LeftOutSteps:
    """Those of the present cell."""

    def __init__(self) -> None:
        self._windows: list[tuple[int, int]] = []
        self._num_steps: Callable[[], int] = lambda: 0
        self._buffers: dict[tuple[int, str], tuple[torch.nn.Module, torch.Tensor]] = {}  # as they were before the step
        self._hook: Any = None

    def install(self, num_steps: Callable[[], int]) -> None:
        """Hear of the steps of optimizers. Called once, in a rank, before who looks at gradients."""
        self._num_steps = num_steps
        register_optimizer_step_pre_hook(self._before_step)

    def begin(self, cell: Execute) -> None:
        """A cell begins."""
        self._windows = [(first, last) for first, last in cell.left_out]
        self._let_go()
        if self._windows:  # modules are looked at in this cell alone: it costs each of them a call
            self._hook = register_module_forward_pre_hook(self._before_forward)

    def _let_go(self) -> None:
        self._buffers.clear()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def _is_left_out(self) -> bool:
        coming = self._num_steps() + 1
        return any(first <= coming <= last for first, last in self._windows)

    def _before_forward(self, module: torch.nn.Module, _: Any) -> None:
        if not module._buffers or not module.training or not self._is_left_out:
            return
        for name, buffer in module.named_buffers(recurse=False):
            if (id(module), name) not in self._buffers:
                self._buffers[(id(module), name)] = (module, buffer.detach().clone())

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Hooked | None:
        if not self._windows or threading.current_thread() is not threading.main_thread():
            return None
        if not self._is_left_out:
            if self._num_steps() >= max(last for _, last in self._windows):
                self._windows = []
                self._let_go()
            return None
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._without(optimizer, args[1]), *args[2:]), kwargs
        if callable(closure := kwargs.get("closure")):
            return args, {**kwargs, "closure": self._without(optimizer, closure)}
        self._undo(optimizer)
        return None

    def _without(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure, in which an optimizer has its gradients made, that leaves none."""

        def computed() -> Any:
            loss = closure()
            self._undo(optimizer)
            return loss

        return computed

    def _undo(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = None
        with torch.no_grad():
            for (_, name), (module, before) in self._buffers.items():
                getattr(module, name).copy_(before)
        self._buffers.clear()


LEFT_OUT = LeftOutSteps()
