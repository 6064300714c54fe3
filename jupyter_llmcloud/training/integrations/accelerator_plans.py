"""Accelerate's own calls carry out the plan of a cell: prepare(), gather(), clip_grad_norm_() and what saves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import get_sampler
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import recursively_apply

from jupyter_llmcloud.core.parallel.plan import APART
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.parallel.balance import BALANCE
from jupyter_llmcloud.training.parallel.plans import layout_of
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.parallel.strategies.base import Asynchronous, Strategy
from jupyter_llmcloud.training.parallel.strategies.prepared import PREPARED
from jupyter_llmcloud.training.preflight.automatic import FORECAST


def install() -> None:
    """From now on in this process. Called once, in a rank."""
    of = "accelerate:Accelerator"
    patches.PLANS.apply(
        {
            f"{of}.prepare": _make_prepare,
            f"{of}.prepare_model": _make_prepare_model,
            f"{of}.get_state_dict": _make_get_state_dict,
            f"{of}.save_state": _make_refusing("save_state"),
            f"{of}.load_state": _make_refusing("load_state"),
            f"{of}.gather": _make_gather,
            f"{of}.reduce": _make_reduce,
            "accelerate.state:PartialState.wait_for_everyone": _make_wait_for_everyone,
            "torch.nn.utils:clip_grad_norm_": _make_clip_grad_norm,
            "torch.nn.utils.clip_grad:clip_grad_norm_": _make_clip_grad_norm,
            "accelerate.accelerator:gather_object": _make_gather_object,
            "accelerate.accelerator:prepare_data_loader": _make_prepare_data_loader,
            "accelerate.scheduler:AcceleratedScheduler.step": _make_scheduler_step,
            "accelerate.data_loader:DataLoaderShard.__iter__": _make_pass,
        }
    )


def _strategy() -> Strategy | None:
    return ACTIVE.strategy


def _is_new(value: Any) -> bool:
    return (
        isinstance(value, torch.nn.Module)
        and value not in PREPARED
        and not getattr(value, "_is_accelerate_prepared", False)
        and any(parameter.requires_grad for parameter in value.parameters())
    )


def _spread(strategy: Strategy, accelerator: Any, model: torch.nn.Module) -> torch.nn.Module:
    if accelerator.mixed_precision == "fp16" and strategy.plan.kind in APART:
        raise UsageError(
            f"--plan {strategy.plan.text}: in fp16 ranks leave out steps of their own, so that they could not meet. "
            "Choose --precision bf16 or no."
        )
    before = dict(model.named_parameters(remove_duplicate=False))
    step = FORECAST.fake_of(model)
    spread = strategy.parallelize(model, accelerator)
    PREPARED.add(spread, before)
    # Loops that accumulate by hand write `with model.no_sync()`, which DistributedDataParallel has. Here nothing is put
    # off: what a plan exchanges in each backward gives the same gradients.
    if not hasattr(spread, "no_sync"):
        spread.no_sync = contextlib.nullcontext  # type: ignore[assignment]
    FORECAST.watch(spread, accelerator, step)
    return spread


def _adopt(strategy: Strategy, optimizer: Any) -> None:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    PREPARED.remap(optimizer)
    strategy.adopt_optimizer(optimizer)


def _make_prepare(original: Any) -> Any:
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        strategy = _strategy()
        if strategy is None:
            for value in filter(_is_new, args):
                FORECAST.watch(value, self, None)
            return original(self, *args, **kwargs)
        args = tuple(_spread(strategy, self, value) if _is_new(value) else value for value in args)
        for value in (*args, *self._optimizers):
            if isinstance(value, torch.optim.Optimizer):
                _adopt(strategy, value)
        return original(self, *args, **kwargs)

    return prepare


def _make_prepare_model(original: Any) -> Any:
    def prepare_model(
        self: Any, model: Any, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        strategy = _strategy()
        if strategy is not None and not evaluation_mode and _is_new(model):
            model = _spread(strategy, self, model)
            for optimizer in self._optimizers:
                _adopt(strategy, optimizer)
        if model in PREPARED:  # there is nothing to be wrapped any more
            return original(self, model, device_placement=False, evaluation_mode=True)
        return original(self, model, device_placement=device_placement, evaluation_mode=evaluation_mode)

    return prepare_model


def _make_get_state_dict(original: Any) -> Any:
    def get_state_dict(self: Any, model: Any, unwrap: bool = True) -> Any:
        if model in PREPARED:
            return layout_of(model).full_state(model)  # the same on every rank, all of which must ask
        return original(self, model, unwrap=unwrap)

    return get_state_dict


def _make_refusing(name: str) -> Any:
    def make(original: Any) -> Any:
        def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
            strategy = _strategy()
            if strategy is not None:
                raise UsageError(
                    f"accelerator.{name}() does not know --plan {strategy.plan.text}: it would keep the optimizer of "
                    "one rank alone. Say --checkpoint-every N, or run.checkpoint() in the cell; --resume RUN goes on."
                )
            return original(self, *args, **kwargs)

        return refuse

    return make


def _make_clip_grad_norm(original: Any) -> Any:
    def clip_grad_norm_(
        parameters: Any,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Any:
        strategy = _strategy()
        total_norm = getattr(strategy, "total_norm", None)
        if total_norm is None:
            return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        tensors = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        norm = total_norm(
            torch.nn.utils.get_total_norm([p.grad for p in tensors if p.grad is not None], norm_type), norm_type
        )
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(f"the total norm of order {norm_type} of the gradients of all stages is non-finite.")
        torch.nn.utils.clip_grads_with_norm_(tensors, max_norm, norm)
        return norm

    return clip_grad_norm_


# --- data ------------------------------------------------------------------------------------------------------------


def _num_copies(strategy: Strategy | None) -> int:
    """How many ranks get the same data."""
    return 1 if strategy is None else strategy.world_size // strategy.data_rank[1]


def _make_prepare_data_loader(original: Any) -> Any:
    def prepare_data_loader(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        strategy = _strategy()
        if strategy is not None and strategy.is_asynchronous:
            _shuffle_alike(get_sampler(dataloader))
            kwargs["rng_types"] = None  # which would have all ranks meet before each pass
        if strategy is not None and strategy.data_rank[1] != strategy.world_size:
            _shuffle_alike(get_sampler(dataloader))
            kwargs["process_index"], kwargs["num_processes"] = strategy.data_rank
            kwargs["dispatch_batches"] = False  # which would cut a batch for all ranks
        prepared = original(dataloader, *args, **BALANCE.options_of(dataloader, kwargs))
        BALANCE.adopt(prepared)
        return prepared

    return prepare_data_loader


def _make_pass(original: Any) -> Any:
    def __iter__(self: Any) -> Iterator[Any]:
        strategy, own = _strategy(), original(self)
        return strategy.shared_pass(self, own) if isinstance(strategy, Asynchronous) else own

    return __iter__


def _shuffle_alike(sampler: Any) -> None:
    """Ranks with the same data take it in one order, which Accelerate sees to only where each has its own.

    All ranks must call it. The order is the one that data parallel ranks would take.
    """
    if not hasattr(sampler, "generator"):
        return
    if sampler.generator is None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        sampler.generator = torch.Generator().manual_seed(seed)
    state = [sampler.generator.get_state()]
    dist.broadcast_object_list(state, src=0)
    sampler.generator.set_state(state[0])


def _make_gather(original: Any) -> Any:
    def gather(self: Any, tensor: Any) -> Any:
        if BALANCE.is_on:
            return recursively_apply(lambda part: _gather_parts(original, self, part), tensor)
        strategy = _strategy()
        if isinstance(strategy, Asynchronous):
            return recursively_apply(lambda part: _joined(strategy.gathered(part)), tensor)
        gathered, copies = original(self, tensor), _num_copies(strategy)
        return _every(gathered, self.num_processes, copies) if copies > 1 else gathered

    return gather


def _make_gather_object(original: Any) -> Any:
    def gather_object(object: Any) -> Any:
        copies = _num_copies(_strategy())
        if copies == 1:
            return original(object)
        return [item for items in original([object])[::copies] for item in items]

    return gather_object


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.reshape(1) if part.ndim == 0 else part for part in parts])


def _gather_parts(original: Any, accelerator: Any, part: torch.Tensor) -> torch.Tensor:
    """As Accelerate gathers, where ranks may have different numbers of rows."""
    if part.ndim:
        sizes = original(accelerator, torch.tensor([len(part)], device=part.device)).tolist()
        if len(set(sizes)) > 1:
            padded = original(accelerator, accelerator.pad_across_processes(part)).chunk(len(sizes))
            return torch.cat([rows[:size] for rows, size in zip(padded, sizes, strict=True)])
    gathered: torch.Tensor = original(accelerator, part)
    return gathered


def _every(value: Any, num_ranks: int, step: int) -> Any:
    """What one rank of those with the same data has given."""
    if isinstance(value, dict):
        return type(value)({key: _every(item, num_ranks, step) for key, item in value.items()})
    if isinstance(value, list | tuple):
        items = [_every(item, num_ranks, step) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return torch.cat(value.chunk(num_ranks)[::step]) if isinstance(value, torch.Tensor) else value


def _make_reduce(original: Any) -> Any:
    def reduce(self: Any, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        strategy = _strategy()
        if isinstance(strategy, Asynchronous):
            return recursively_apply(lambda part: _reduced(strategy.gathered(part), reduction, scale), tensor)
        reduced = original(self, tensor, reduction, scale)
        copies = _num_copies(strategy) if reduction == "sum" else 1
        return recursively_apply(lambda part: _one_of(part, copies), reduced) if copies > 1 else reduced

    return reduce


def _one_of(total: torch.Tensor, copies: int) -> torch.Tensor:
    """Of a sum over ranks so many of which have the same value; a count stays one."""
    return total / copies if total.is_floating_point() or total.is_complex() else total // copies


def _reduced(parts: list[torch.Tensor], reduction: str, scale: float) -> torch.Tensor:
    if reduction not in ("sum", "mean"):
        raise UsageError(f"--plan async-ps: accelerator.reduce() takes 'sum' or 'mean', not {reduction!r}.")
    together = torch.stack(parts)
    found = together.mean(0) if reduction == "mean" else together.sum(0, dtype=together.dtype)
    return found if scale == 1.0 else found * scale


def _make_wait_for_everyone(original: Any) -> Any:
    def wait_for_everyone(self: Any) -> None:
        strategy = _strategy()
        if isinstance(strategy, Asynchronous):
            strategy.wait_for_everyone()
        else:
            original(self)

    return wait_for_everyone


def _make_scheduler_step(original: Any) -> Any:
    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        strategy = _strategy()
        is_as_usual = _num_copies(strategy) == 1 and not BALANCE.keeps_batches
        if is_as_usual or self.split_batches or not self.step_with_optimizer:
            return original(self, *args, **kwargs)
        times = BALANCE.num_sharing if self.gradient_state.sync_gradients else 1
        total = getattr(self.scheduler, "total_steps", None)
        with _once_each(self):
            for _ in range(times):
                if total is None or self.scheduler._step_count <= total:  # as Accelerate has it
                    original(self, *args, **kwargs)

    return step


@contextlib.contextmanager
def _once_each(scheduler: Any) -> Iterator[None]:
    """A step of the schedule is one, not one for each process of the world: some of them have the same data."""
    scheduler.split_batches = True
    try:
        yield
    finally:
        scheduler.split_batches = False
