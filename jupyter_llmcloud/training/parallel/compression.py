"""Gradients of data parallel training that travel smaller: `--compress-gradients fp16|bf16|powersgd`.

By torch's communication hooks. PowerSGD (arXiv 1905.13727) sends factors of rank 2 of each gradient matrix from the
11th step on, and adds what they leave out to the next gradient; what was left out is in no checkpoint, so that a
resumed run begins with 10 steps that are not compressed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from jupyter_llmcloud.errors import UsageError

_RANK = 2
_WHOLE_STEPS = 10


def compress(model: DistributedDataParallel, name: str) -> None:
    """Have a wrapper send its gradients in this way; "" or "no": as they are. Raises UsageError."""
    if name in ("", "no"):
        return
    if name == "bf16" and model.device_type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError("--compress-gradients bf16: these GPUs have no bfloat16. Choose fp16.")
    group = model.process_group
    if name == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=group, matrix_approximation_rank=_RANK, start_powerSGD_iter=_WHOLE_STEPS
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    else:
        model.register_comm_hook(group, {"fp16": default_hooks.fp16_compress_hook, "bf16": _in_bfloat16}[name])


def begun_anew(state: Any, group: dist.ProcessGroup) -> Any:
    """The state of a communication hook whose wrapper is initialised again, on `group`: its buckets differ at first.

    A world that has another size has a group that stands for no former one.
    """
    if isinstance(state, dist.ProcessGroup):
        return group
    if isinstance(state, powerSGD_hook.PowerSGDState):
        state.process_group = state.process_group and group
        state.iter = 0
        for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            kept.clear()
    return state


def _in_bfloat16(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's own hook for bfloat16 is refused on a CPU, where gloo adds such numbers as well."""
    buffer = bucket.buffer()
    small = buffer.to(torch.bfloat16).div_(group.size())
    work = dist.all_reduce(small, group=group, async_op=True)
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: buffer.copy_(done.value()[0]))
    return future


_in_bfloat16.__annotations__.clear()  # DistributedDataParallel compares them as types, not as text
