"""`--watch not-finite=skip`: an optimizer step whose gradients are not finite is left out, on all ranks alike.

As torch's GradScaler does it, for any precision: the gradients of the step are dropped, so that it changes nothing, and
training goes on with the next batch. Under DistributedDataParallel every rank holds the same gradients and comes to the
same answer by itself; where ranks hold parts of them, one number is reduced for each step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from jupyter_llmcloud.core.detect.run_detectors import policies
from jupyter_llmcloud.core.parallel.plan import parse_plan
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.output.sender import OutputSender

MAX_IN_A_ROW = 20  # then it is no batch that is at fault
_APART = ("fsdp", "hsdp", "tp", "tp+fsdp", "pipeline")  # plans under which ranks hold different gradients of one model


class FiniteGradients:
    """Leaves out steps, where the cell asks for it."""

    def __init__(self) -> None:
        self._is_on = False
        self._reduces = False
        self._in_a_row: dict[int, int] = {}  # steps left out, by the id of the optimizer
        self._num_steps: Callable[[], int] = lambda: 0
        self._sender: OutputSender | None = None

    def install(self, sender: OutputSender, num_steps: Callable[[], int]) -> None:
        """Hear of the steps of optimizers. Called once, in a rank, after who changes gradients at a step."""
        self._sender, self._num_steps = sender, num_steps
        register_optimizer_step_pre_hook(self._before_step)

    def begin(self, cell: Execute, world_size: int) -> None:
        """A cell begins."""
        chosen = cell.spec.get("watch") or ""
        self._is_on = bool(chosen) and policies(chosen).get("not-finite") == "skip"
        self._reduces = world_size > 1 and parse_plan(cell.plan or "ddp").kind in _APART
        self._in_a_row.clear()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)  # which makes its gradients in the step
        if not self._is_on or closure or threading.current_thread() is not threading.main_thread():
            return
        if getattr(optimizer, "found_inf", None) is not None:  # a GradScaler's: a fused optimizer looks by itself
            return
        parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
        parameters = [weight for weight in parameters if weight.grad is not None]
        if self._all_finite([weight.grad for weight in parameters]):
            self._in_a_row.pop(id(optimizer), None)
            return
        for weight in parameters:
            weight.grad = None
        number = self._in_a_row[id(optimizer)] = self._in_a_row.get(id(optimizer), 0) + 1
        if number > MAX_IN_A_ROW:
            raise FloatingPointError(
                f"the gradients of {number} steps in a row are not finite. --watch not-finite=skip leaves out batches;"
                " here the model, its learning rate or its precision is at fault: lower the rate or clip the gradients."
            )
        self._tell(self._num_steps())

    def _all_finite(self, gradients: list[Any]) -> bool:
        parts = [part.to_local() if hasattr(part, "to_local") else part for part in gradients]  # of a DTensor
        parts = [part.coalesce().values() if part.is_sparse else part for part in parts]
        checks = [torch.isfinite(part).all().float() for part in parts]
        if not self._reduces:
            return not checks or bool(torch.stack([check.cpu() for check in checks]).all())
        device = checks[0].device if checks else torch.device("cpu")
        verdict = torch.stack([check.to(device) for check in checks]).min() if checks else torch.ones((), device=device)
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return bool(verdict)

    def _tell(self, step: int) -> None:
        assert self._sender is not None
        text = f"not-finite: the gradients of step {step} are not finite: it is left out (--watch not-finite=skip)."
        alert = {"detector": "not-finite", "step": step, "text": text.split(": ", 1)[1].rstrip(".")}
        self._sender.record({"kind": "stderr", "text": f"{text}\n", "warning": True, "alert": alert})


FINITE = FiniteGradients()
