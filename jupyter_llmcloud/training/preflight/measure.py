"""A program started by name: executes a cell until its optimizer has made two steps, and says what that holds.

python -m jupyter_llmcloud.training.preflight.measure REQUEST.json ANSWER.json
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from jupyter_llmcloud.core.parallel.plan import ParallelPlan, parse_plan
from jupyter_llmcloud.core.preflight.timeline import MeasuredStep, Roles, held, peaks
from jupyter_llmcloud.system.processes import end_with_parent
from jupyter_llmcloud.training.diagnostics.memory_left import available, before_limits, resident
from jupyter_llmcloud.training.parallel.strategies.fully_sharded import blocks_of
from jupyter_llmcloud.training.preflight.program import (
    EnoughSeen,
    Program,
    do_as_ranks,
    shorten_loaders,
    shorten_trainers,
    uses,
)
from jupyter_llmcloud.training.preflight.tracker import (
    AllocationTracker,
    Alone,
    NoMemoryLeft,
    all_in_one,
    keep_modules_in_place,
)

STEPS = 2  # the second has the optimizer's state from its beginning
MOST_OF_MEMORY = 0.5  # of what this machine has left may be taken by real tensors
CONTEXT = 600 << 20  # bytes that CUDA takes for itself


class StepMeasure:
    """Follows the optimizers of the cell.

    Attributes:
        step: what was measured; None until two steps were made.

    Args:
        plan: says what is gathered as a whole.
    """

    def __init__(self, tracker: AllocationTracker, plan: ParallelPlan) -> None:
        self.step: MeasuredStep | None = None
        self._tracker, self._plan = tracker, plan
        self._is_on = False
        self._begins: list[int] = []  # numbers of events where the steps ended
        self._flops = 0
        self._rows: Counter[int] = Counter()

    def begin(self) -> None:
        """The cell itself is executed from now on."""
        self._is_on = True
        register_optimizer_step_pre_hook(self._before)
        register_optimizer_step_post_hook(self._after)

    def read(self, batch: Any) -> None:
        """A loader has given a batch."""
        sizes = [leaf.shape[0] for leaf in tree_leaves(batch) if torch.is_tensor(leaf) and leaf.dim()]
        if self._is_on and sizes:
            self._rows[sizes[0]] += 1

    def _before(self, *_: Any) -> None:
        self._update = len(self._tracker.events)

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._begins.append(len(self._tracker.events))
        if len(self._begins) == STEPS:
            self.step = self._measured(optimizer)
            raise EnoughSeen
        self._flops = self._tracker.flops

    def _measured(self, optimizer: torch.optim.Optimizer) -> MeasuredStep:
        tracker, events = self._tracker, list(self._tracker.events)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        roots = _roots(trained)
        models = _parameters(trained, roots)
        state = [value for each in optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
        roles = Roles(
            {tracker.number(each) for each in models},
            {tracker.number(each.grad) for each in trained if each.grad is not None},
            {tracker.number(each) for each in state},
        )
        events = list(tracker.events)
        beside, update, peak = peaks(events, roles, self._begins[0], self._update)
        return MeasuredStep(
            held(events, roles.parameters),
            held(events, roles.gradients),
            held(events, roles.optimizer),
            beside,
            update,
            peak,
            num_parameters=sum(each.numel() for each in models),
            flops=tracker.flops - self._flops,
            batch=self._rows.most_common(1)[0][0] if self._rows else 0,
            largest_block=max((largest_block(root, self._plan) for root in roots), default=0),
        )


def _roots(trained: list[torch.Tensor]) -> list[torch.nn.Module]:
    """The models that have what is trained, each as whoever shards it is given it."""
    known = {id(each) for each in trained}
    modules = [each for each in gc.get_objects() if issubclass(type(each), torch.nn.Module)]
    having = [each for each in modules if any(id(own) in known for own in each.parameters())]
    plain = [each for each in having if not isinstance(each, Alone)]
    inner = {id(child) for each in plain for child in each.modules() if child is not each}
    return [each for each in plain if id(each) not in inner]


def _parameters(trained: list[torch.Tensor], roots: list[torch.nn.Module]) -> list[torch.Tensor]:
    """Those that are trained, and those of the models that have them which are not."""
    found = {id(each): each for module in roots for each in [*module.parameters(), *module.buffers()]}
    return list(({id(each): each for each in trained} | found).values())


def largest_block(model: torch.nn.Module, plan: ParallelPlan) -> int:
    """Bytes of the largest part that is gathered as a whole: a block, or what is left of the model without them.

    Raises UsageError when the plan names a class that the model has no module of.
    """
    seen = set[int]()
    sizes = []
    for block in [*blocks_of(model, plan), model]:  # inner ones first: what they have is no part of the outer one
        own = [each for each in block.parameters() if id(each) not in seen]
        seen |= {id(each) for each in own}
        sizes.append(sum(each.numel() * each.element_size() for each in own))
    return max(sizes)


def main(request_file: str, answer_file: str) -> None:
    """Write the answer: what was measured, or why nothing was."""
    request = json.loads(Path(request_file).read_text())
    end_with_parent(request["alive"], Path(request_file).parent)
    answer: dict[str, Any] = {"budget": _budget(request)}
    try:
        answer |= _measure(request)
    except BaseException as error:  # also a SystemExit of the cell
        answer["error"] = "".join(traceback.format_exception_only(error)).strip()
        traceback.print_exc()
    Path(answer_file).write_text(json.dumps(answer))


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    world_size = request["world_size"]
    _join(world_size, request["precision"])
    tracker = AllocationTracker(request["is_fake"], int(MOST_OF_MEMORY * available()))
    measure = StepMeasure(tracker, parse_plan(request["sharded"]))
    program = Program(request, 0, world_size)
    do_as_ranks(request, program.run)
    shorten_loaders(program, on_batch=measure.read)
    if request["is_fake"]:
        keep_modules_in_place()
    if uses(request, "transformers"):
        shorten_trainers()
    try:
        with all_in_one(tracker):
            program.execute(measure.begin)
    except EnoughSeen:
        pass
    except NoMemoryLeft:
        return {"too_large": True}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}", "where": program.where_failed(error)}
    return {"step": asdict(measure.step) if measure.step is not None else None}


def _join(world_size: int, precision: str) -> None:
    """A group of as many ranks as there will be, of which the others do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": precision}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


def _budget(request: dict[str, Any]) -> dict[str, Any]:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(request["precision"], torch.float32)
    if torch.cuda.is_available():
        free = min(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
        name = torch.cuda.get_device_name(0)
        return {"bytes": free, "device": name, "flops_per_s": _rate("cuda", dtype, 4096), "overhead": CONTEXT}
    left = min([(available() + resident()) // request["world_size"], *(each + resident() for each in before_limits())])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // request["world_size"]))
    return {"bytes": left, "device": "cpu", "flops_per_s": _rate("cpu", dtype, 512), "overhead": resident()}


def _rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of two matrices."""
    matrix = torch.rand(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (matrix @ matrix).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


if __name__ == "__main__":
    main(*sys.argv[1:])
