"""Accelerate's own calls carry out the plan of a cell: prepare(), gather(), clip_grad_norm_() and what saves."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, get_sampler
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, DynamoBackend, pad_across_processes, recursively_apply
from torch.distributed.tensor import DTensor

from jupyter_llmcloud.core.parallel.plan import APART
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.integrations.whole_states import in_place_of
from jupyter_llmcloud.training.parallel.balance import BALANCE
from jupyter_llmcloud.training.parallel.plans import layout_of
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.parallel.strategies.base import Asynchronous, Strategy
from jupyter_llmcloud.training.parallel.strategies.microbatches import PipelinedModel
from jupyter_llmcloud.training.parallel.strategies.prepared import PREPARED
from jupyter_llmcloud.training.parallel.unwrap import chain, uncompiled
from jupyter_llmcloud.training.preflight.automatic import FORECAST


def install() -> None:
    """From now on in this process. Called once, in a rank."""
    of = "accelerate:Accelerator"
    patches.PLANS.apply(
        {
            f"{of}.__init__": _make_init,
            f"{of}.num_processes": _make_num_processes,
            f"{of}.prepare": _make_prepare,
            f"{of}.prepare_model": _make_prepare_model,
            f"{of}.get_state_dict": _make_get_state_dict,
            f"{of}.save": _make_save,
            f"{of}.save_state": _make_whole_state("save_state"),
            f"{of}.load_state": _make_whole_state("load_state"),
            f"{of}.gather": _make_gather,
            f"{of}.reduce": _make_reduce,
            "accelerate.state:PartialState.wait_for_everyone": _make_wait_for_everyone,
            "accelerate.state:PartialState.split_between_processes": _make_split_between_processes,
            "accelerate.local_sgd:LocalSGD.__init__": _make_local_sgd,
            "accelerate.accelerator:gather_object": _make_gather_object,
            "accelerate.utils:gather": _make_function_gather,
            "accelerate.utils:reduce": _make_function_reduce,
            "accelerate.utils:gather_object": _make_gather_object,
            "accelerate.accelerator:prepare_data_loader": _make_prepare_data_loader,
            "accelerate.scheduler:AcceleratedScheduler.step": _make_scheduler_step,
            "accelerate.data_loader:DataLoaderShard.__iter__": _make_pass,
        }
    )


def _strategy() -> Strategy | None:
    return ACTIVE.strategy


_PLUGINS = {"ACCELERATE_USE_FSDP": "fsdp_plugin", "ACCELERATE_USE_DEEPSPEED": "deepspeed_plugin"}


def _make_init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        strategy = _strategy()
        given = [plugin for name, plugin in _PLUGINS.items() if os.environ.get(name, "").lower() == "true"]
        if not given or self.state.num_processes == 1:
            return
        if self.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            if strategy is not None:
                raise UsageError(
                    f"--plan {strategy.plan.text}: Accelerator({given[0]}=...) would spread the model a second time. "
                    "Leave one of both out."
                )
        elif strategy is None and self.is_main_process:
            print(
                f"Accelerator({given[0]}=...) has no effect on ranks without GPUs, where Accelerate leaves it out: "
                "each has the whole model, as under --plan ddp. Say --plan fsdp on the line of the cell.",
                file=sys.stderr,
            )

    return __init__


def _make_num_processes(original: Any) -> Any:
    def num_processes(self: Any) -> int:
        """How many ranks have data of their own: as many as gather() brings together, and a schedule is stepped for.

        Loops multiply by it, and divide, what they have gathered.
        """
        count: int = original.fget(self)
        return max(1, count // _num_copies(_strategy()))

    return property(num_processes)


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
    whole = uncompiled(model)
    before = dict(whole.named_parameters(remove_duplicate=False))
    step = FORECAST.fake_of(model)
    spread = strategy.parallelize(whole, accelerator)
    if spread is whole:
        spread = model
    elif strategy.rank == 0 and (whole is not model or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO):
        print(f"--plan {strategy.plan.text}: the parts of a model are not compiled here.", file=sys.stderr)
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


def _spread_within(model: Any) -> Any:
    """What was spread of a model that the loop has, which may be a compiled one of it; None when nothing was."""
    return next((part for part in chain(model) if part in PREPARED), None)


def _make_get_state_dict(original: Any) -> Any:
    def get_state_dict(self: Any, model: Any, unwrap: bool = True) -> Any:
        if (spread := _spread_within(model)) is not None:
            say_apart(spread)
            # The same on every rank, all of which must ask; of the kind in which save() looks for tensors that are one.
            return OrderedDict(layout_of(spread).full_state(spread))
        return original(self, model, unwrap=unwrap)

    return get_state_dict


def say_apart(model: torch.nn.Module) -> None:
    """The cell is about to save a model itself, of which ranks may have trained replicas apart."""
    strategy = _strategy()
    if strategy is not None and (words := strategy.about_to_save(model)) and strategy.rank == 0:
        print(words, file=sys.stderr)


def _make_save(original: Any) -> Any:
    def save(self: Any, obj: Any, f: Any, safe_serialization: bool = False) -> Any:
        strategy = _strategy()
        if strategy is not None and strategy.cuts_models and _is_part(obj):
            raise UsageError(
                f"--plan {strategy.plan.text}: accelerator.save() writes what the first rank has, and of this model it "
                "has a part only. Give it accelerator.get_state_dict(model), for which all ranks must ask, or call "
                "accelerator.save_model(model, folder)."
            )
        return original(self, obj, f, safe_serialization)

    return save


def _is_part(value: Any) -> bool:
    """Whether it is the state of a model, or holds one, of which other ranks have the rest."""
    if isinstance(value, DTensor):
        return True
    if isinstance(value, list | tuple):
        return any(_is_part(item) for item in value)
    if not isinstance(value, dict):
        return False
    names = {name.removeprefix("module.") for name in value if isinstance(name, str)}
    of_stages = [model.shapes.keys() for model in PREPARED.models if isinstance(model, PipelinedModel)]
    return any(names and names < whole for whole in of_stages) or any(map(_is_part, value.values()))


def _make_whole_state(name: str) -> Any:
    def make(original: Any) -> Any:
        def of_whole(self: Any, *args: Any, **kwargs: Any) -> Any:
            strategy = _strategy()
            if strategy is None:
                return original(self, *args, **kwargs)
            if not strategy.cuts_tensors:
                raise UsageError(
                    f"accelerator.{name}() does not know --plan {strategy.plan.text}: it would keep the optimizer of "
                    "one rank alone. Say --checkpoint-every N, or run.checkpoint() in the cell; --resume RUN goes on."
                )
            with in_place_of(self, _spread_within, models=name == "load_state"):
                return original(self, *args, **kwargs)

        return of_whole

    return make


def _make_local_sgd(original: Any) -> Any:
    def __init__(self: Any, accelerator: Any, model: Any, local_sgd_steps: int, enabled: bool = True) -> None:
        strategy = _strategy()
        if strategy is not None and enabled:
            raise UsageError(
                f"--plan {strategy.plan.text}: LocalSGD of Accelerate averages what each rank has of a model, which is "
                f"the whole model under --plan ddp only. Leave --plan out, or say --plan local-sgd:{local_sgd_steps} "
                "and leave LocalSGD out."
            )
        original(self, accelerator, model, local_sgd_steps, enabled)

    return __init__


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
        if strategy is not None and (words := _unequal_batches(prepared, strategy)):
            if strategy.cuts_tensors:  # every forward pass brings all ranks together
                raise UsageError(words)
            strategy.note_unequal(prepared, words)
        BALANCE.adopt(prepared)
        return prepared

    return prepare_data_loader


def _unequal_batches(loader: Any, strategy: Strategy) -> str:
    """What is to be said of a loader that has more batches for some ranks; "" of others."""
    sampler = getattr(getattr(loader, "base_dataloader", None), "batch_sampler", None)
    number = strategy.data_rank[1]
    if not isinstance(sampler, BatchSamplerShard) or sampler.even_batches or sampler.split_batches or sampler.drop_last:
        return ""
    if not hasattr(sampler.batch_sampler, "__len__") or not (left := sampler.total_length % number):
        return ""
    return (
        f"--plan {strategy.plan.text}: a pass over a loader of {sampler.total_length} batches with even_batches=False "
        f"is one batch longer for {left} of {number} ranks, which would wait for the others for ever. Leave "
        "even_batches=False out (gather_for_metrics() drops what is filled up), or say drop_last=True."
    )


def _make_pass(original: Any) -> Any:
    def __iter__(self: Any) -> Iterator[Any]:
        strategy, own = _strategy(), original(self)
        if isinstance(strategy, Asynchronous):
            return strategy.shared_pass(self, own)
        return strategy.pass_over(self, own) if strategy is not None else own

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
        if strategy is None or copies == 1:
            return gathered
        return _every(gathered, strategy.world_size, copies)

    return gather


def _make_function_gather(original: Any) -> Any:
    """For the function of that name, which cells import beside an Accelerator."""
    of_accelerator = _make_gather(lambda _, tensor: original(tensor))

    def gather(tensor: Any) -> Any:
        return of_accelerator(None, tensor)

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
            padded = original(accelerator, pad_across_processes(part)).chunk(len(sizes))
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


def _make_function_reduce(original: Any) -> Any:
    of_accelerator = _make_reduce(lambda _, tensor, reduction, scale: original(tensor, reduction, scale))

    def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
        return of_accelerator(None, tensor, reduction, scale)

    return reduce


def _one_of(total: torch.Tensor, copies: int) -> torch.Tensor:
    """Of a sum over ranks so many of which have the same value; a count stays one, a flag of one of them is set."""
    return total / copies if total.is_floating_point() or total.is_complex() else -(-total // copies)


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


def _make_split_between_processes(original: Any) -> Any:
    def split_between_processes(self: Any, inputs: Any, apply_padding: bool = False) -> Any:
        strategy = _strategy()
        shares = self if _num_copies(strategy) == 1 or strategy is None else _OfDataRank(self, *strategy.data_rank)
        return original(shares, inputs, apply_padding)

    return split_between_processes


class _OfDataRank:
    """The state of a process that counts those which have data of their own."""

    def __init__(self, state: Any, rank: int, number: int) -> None:
        self._state = state
        self.process_index, self.num_processes = rank, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


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
