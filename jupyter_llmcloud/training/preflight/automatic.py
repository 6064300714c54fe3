"""Before its first step a rank works out what that will need, and warns when it does not fit.

It looks at the model that the cell has prepared and at the first batch that the cell gives it. The step is worked out
by a copy of the model whose tensors have sizes and no memory: the cell's own code is executed once only, as without it,
and what it draws, counts and writes is what it would be. Where nothing large is at stake nothing is done.
"""

from __future__ import annotations

import copy
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import tree_leaves, tree_map

from jupyter_llmcloud.core.parallel.plan import ParallelPlan, parse_plan
from jupyter_llmcloud.core.preflight.forecast import forecast, may_matter, state_bytes, still_needed
from jupyter_llmcloud.core.preflight.timeline import MeasuredStep, Roles, held, peaks
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.diagnostics.memory_left import available, before_limits
from jupyter_llmcloud.training.parallel.unwrap import unwrapped
from jupyter_llmcloud.training.preflight.tracker import AllocationTracker, TookTooLong

_MOST_S = 15.0  # a model that is worked out for longer is not worth it
_WHOLE = ("ddp", "local-sgd", "diloco", "async-ps")  # every rank has the model
_SHARDED = ("fsdp", "hsdp")


class Forecaster:
    """Of the present cell. One per process.

    Attributes:
        last: what was worked out last, for who compares it: bytes needed beside parameters, and how long it took.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self._plan, self._world_size = ParallelPlan(), 1
        self._device = torch.device("cpu")
        self._say: Callable[[str], None] = lambda _: None
        self._pending: list[_FirstForward] = []

    def install(self, say: Callable[[str], None]) -> None:
        """Warn by `say`. Called once, in a rank."""
        self._say = say

    def begin(self, cell: Execute, world_size: int, device: torch.device) -> None:
        """A cell begins."""
        self._plan, self._world_size, self._device = parse_plan(cell.plan or "ddp"), world_size, device
        self.last = {}
        self._pending = [each for each in self._pending if each.listen()]

    def close(self) -> None:
        """The cell has ended, however: a model that leaves this rank between cells carries nothing of ours."""
        self._pending = [each for each in self._pending if each.is_awaited]
        for each in self._pending:
            each.ignore()

    def fake_of(self, model: torch.nn.Module) -> Any:
        """What is needed of a model that is about to be cut over the ranks; None when it will be there anyhow."""
        if self._plan.kind not in _SHARDED or not may_matter(_bytes(model), 0, self._left()):
            return None
        return _attempted(lambda: _Step(model, self._plan))

    def watch(self, model: torch.nn.Module, accelerator: Any, step: Any) -> None:
        """A model was prepared: what its first step needs is worked out when that begins."""
        plain = unwrapped(model)
        if self._plan.kind not in (*_WHOLE, *_SHARDED) or (self._plan.kind in _SHARDED and step is None):
            return
        if _is_compiled(model, accelerator):
            return  # what is traced must be the model alone
        owner = weakref.ref(accelerator)

        def look(model: torch.nn.Module, args: Any, kwargs: Any) -> None:
            self._look(model, args, kwargs, owner(), step)

        self._pending.append(_FirstForward(plain, look))

    def _look(self, model: torch.nn.Module, args: Any, kwargs: Any, accelerator: Any, step: Any) -> None:
        values = sum(leaf.numel() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf))
        left, parameters = self._left(), step.parameters if step is not None else _bytes(model)
        if not left or accelerator is None or not may_matter(parameters, values, left):
            return
        began = time.perf_counter()
        found = step or _attempted(lambda: _Step(model, self._plan))
        if found is None:
            return
        measured, missing = found.measured(args, kwargs, accelerator)
        self.last = {
            "needed": still_needed(measured, self._plan, self._world_size, self._device.type),
            "activations": measured.activations,
            "seconds": time.perf_counter() - began,
        }
        name = "cpu" if self._device.type == "cpu" else torch.cuda.get_device_name(self._device)
        if warning := forecast(measured, self._plan, self._world_size, left, name, missing):
            self._say(warning + "\n")

    def _left(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        share = available() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return min([share, *before_limits()])


class _FirstForward:
    """Calls once, before a model is trained first, with it and what it is called with. Copies of it do not call."""

    def __init__(self, model: torch.nn.Module, look: Callable[[torch.nn.Module, Any, Any], None]) -> None:
        self._model, self._look = weakref.ref(model), look
        self.is_awaited = True
        self._handle: Any = None
        self.listen()

    def listen(self) -> bool:
        """From now on; returns whether the model is there."""
        if (model := self._model()) is not None and self._handle is None:
            self._handle = model.register_forward_pre_hook(self, with_kwargs=True)
        return model is not None

    def ignore(self) -> None:
        """Until it is to listen again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if module is self._model() and module.training and torch.is_grad_enabled():
            self.ignore()
            self.is_awaited = False
            self._look(module, args, kwargs)

    def __reduce__(self) -> Any:
        return _not_looking, ()


def _looks_at_nothing(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
    """The hook of a copy."""


def _not_looking() -> Any:
    return _looks_at_nothing


class _Step:
    """A model without memory.

    Attributes:
        parameters: their bytes, on a rank that has them all.
    """

    def __init__(self, model: torch.nn.Module, plan: ParallelPlan) -> None:
        from torch._subclasses.fake_tensor import FakeCopyMode

        from jupyter_llmcloud.training.parallel.strategies.fully_sharded import blocks_of

        self.parameters = _bytes(model)
        self._largest = (
            max((_bytes(block) for block in blocks_of(model, plan)), default=0) if "wrap" in plan.settings else 0
        )
        self._tracker = AllocationTracker(True, most=1 << 62)
        assert self._tracker.fake is not None
        with FakeCopyMode(self._tracker.fake):
            self._model = copy.deepcopy(model)

    def measured(self, args: Any, kwargs: Any, accelerator: Any) -> tuple[MeasuredStep, list[str]]:
        """One forward and backward with such a batch, and what the optimizers of the cell keep."""
        trained = [each for each in self._model.parameters() if each.requires_grad]
        gradients = sum(each.numel() * each.element_size() for each in trained)
        states, missing = _states(accelerator, gradients)
        beside = _attempted(lambda: self._activations(args, kwargs, accelerator))
        if beside is None:
            missing.append("activations, which could not be worked out")
        activations, peak = beside or (0, self.parameters + gradients)
        # On a GPU an optimizer updates all parameters in one go, by temporary tensors of their size.
        on_gpu = any(leaf.device.type == "cuda" for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf))
        update = gradients if on_gpu else max((each.numel() * each.element_size() for each in trained), default=0)
        alone = self.parameters + gradients + states
        step = MeasuredStep(
            self.parameters,
            gradients,
            states,
            activations,
            update,
            max(peak + states, alone + update),
            batch=next(
                (leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf) and leaf.ndim), 0
            ),
            largest_block=self._largest,
        )
        return step, missing

    def _activations(self, args: Any, kwargs: Any, accelerator: Any) -> tuple[int, int]:
        tracker, fake = self._tracker, self._tracker.fake
        assert fake is not None
        tracker.ends_at = time.monotonic() + _MOST_S

        def faked(leaf: Any) -> Any:
            return fake.from_tensor(leaf.detach()) if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf

        inputs, named = tree_map(faked, (args, kwargs))
        for parameter in self._model.parameters():
            tracker.number(parameter)
        begin = len(tracker.events)
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), tracker, accelerator.autocast():
            output = self._model(*inputs, **named)
            _loss(output).backward()
        trained = {tracker.number(each) for each in self._model.parameters()}
        grads = {tracker.number(each.grad) for each in self._model.parameters() if each.grad is not None}
        events = list(tracker.events)
        beside, _, peak = peaks(events, Roles(trained, grads, ()), begin, len(events) + 1)
        return beside, peak - held(events, trained) + self.parameters


def _loss(output: Any) -> torch.Tensor:
    """A number that depends on all that a model gives, as a loss does."""
    loss = getattr(output, "loss", None)
    if torch.is_tensor(loss):
        return loss
    leaves = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.requires_grad]
    if not leaves and hasattr(output, "values"):
        leaves = [leaf for leaf in tree_leaves(list(output.values())) if torch.is_tensor(leaf) and leaf.requires_grad]
    return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()


def _states(accelerator: Any, gradients: int) -> tuple[int, list[str]]:
    """Bytes of the state of the cell's optimizer, and in words what is not known of it."""
    for wrapper in accelerator._optimizers:
        inner = getattr(wrapper, "optimizer", wrapper)
        kind = next((base.__name__ for base in type(inner).__mro__ if base.__module__.startswith("torch.optim")), "")
        kind = type(inner).__name__ if kind in ("", "Optimizer") else kind
        size = state_bytes(kind, inner.defaults, gradients)
        return size, [] if size or kind == "SGD" else [f"what {type(inner).__name__} keeps"]
    return 0, ["what an optimizer keeps"]


def _is_compiled(model: torch.nn.Module, accelerator: Any) -> bool:
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        return True
    parts = list(model.modules())
    return any(isinstance(part, OptimizedModule) or part._compiled_call_impl is not None for part in parts)


def _bytes(module: torch.nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in [*module.parameters(), *module.buffers()])


def _attempted(work: Callable[[], Any]) -> Any:
    """What comes of it; None when a model cannot be copied or executed like this: it trains all the same."""
    try:
        return work()
    except (Exception, TookTooLong):
        return None


FORECAST = Forecaster()
