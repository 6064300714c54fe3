"""Global batches cut over the ranks there are: by speed (`--balance`), and for any number of them (`--elastic`).

A prepared loader cuts every global batch by the shares of now. With `--balance` that batch is the one it would have
been without; with `--elastic` it is the one of the world that the run began with, so that a step, the length of a pass
and every count of steps stay what they were. The gradients of a rank are weighed by its rows before
DistributedDataParallel averages them, so that their mean is that of the whole batch. Speed is what a rank needs from
the moment it asks for a batch until its last gradient is there, without what it waits for others: at the end of each
backward pass, and before a forward pass, where ranks take over the buffers of the first.
"""

from __future__ import annotations

import contextlib
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import IterableDataset

from jupyter_llmcloud.core.parallel.balance import Balance
from jupyter_llmcloud.core.scheduling.elasticity import SizeBounds
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.diagnostics.loss_kinds import kind_of_loss
from jupyter_llmcloud.training.diagnostics.step_speed import EVERY, MAX_ROUNDING, StepMeasures, StepSpeed

_SUM = (
    "the loss is a sum over its rows, or one that is divided by a count: a share of the rows is not that share of the "
    "gradient."
)
_TAKE_MEAN = 'Take a mean: loss.mean(), reduction="mean".'
_UNLIKE = (
    "the loss is a mean over targets of which rows have unlike numbers or weights (ignore_index, a mask, weight=): a "
    "step is near that of one process, not equal to it, since gradients are weighed by rows"
)


@dataclass(frozen=True)
class DataRanks:
    """The ranks that take a share of a batch each; where several compute one batch together, they count as one.

    Attributes:
        rank, num: this one, and how many there are.
        reference: how many an elastic run began with; 0 where their number is fixed.
        least, most: how many it may have.
        must_be_even: whether all need as many rows, since nothing weighs their gradients.
    """

    rank: int = 0
    num: int = 1
    reference: int = 0
    least: int = 1
    most: int = 1
    must_be_even: bool = False

    @classmethod
    def of(
        cls, data_rank: tuple[int, int], world_size: int, reference: int, elastic: str, must_be_even: bool
    ) -> DataRanks:
        """Of a plan in which `data_rank` is this rank among those that have data of their own."""
        rank, num = data_rank
        bounds = SizeBounds.of(elastic)
        if bounds is None or not reference:
            return cls(rank, num)
        begun, least, most = (max(1, size // (world_size // num)) for size in (reference, bounds.least, bounds.most))
        return cls(rank, num, begun, least, most, must_be_even)


NO_RANKS = DataRanks()  # of a process that has executed no cell


class Pass:
    """One pass over a loader that is trained on: which shares hold from which batch on.

    Attributes:
        number: how many began before; alike on all ranks.
        drawn: batches that the loader has asked for, ahead of those it has delivered.
    """

    def __init__(self, number: int, weights: Balance) -> None:
        self.number = number
        self.drawn = 0
        self.delivered = 0
        self._since: list[tuple[int, Balance]] = [(0, weights)]
        self._sizes: dict[int, list[int]] = {}

    def draw(self, total: int) -> list[int]:
        """The rows of every rank in the next batch, which has so many over all."""
        balance = next(known for first, known in reversed(self._since) if first <= self.drawn)
        rows = balance.rows(total)
        self._sizes[self.drawn] = rows
        self.drawn += 1
        return rows

    def change(self, first: int, balance: Balance) -> None:
        """Other shares hold from a batch on that no rank has drawn yet."""
        self._since.append((first, balance))

    def deliver(self, draws_here: bool) -> list[int]:
        """The rows of every rank in the batch that is handed out now; `draws_here`: it is the last one drawn."""
        at = self.drawn - 1 if draws_here else self.delivered
        self.delivered = at + 1
        for index in [index for index in self._sizes if index < at]:
            del self._sizes[index]
        return self._sizes.get(at, [])


class BalancedShard(BatchSamplerShard):
    """Accelerate's part of each batch, cut by the shares of the ranks while a model is trained."""

    current: Pass | None = None

    def __iter__(self) -> Iterator[list[int]]:
        self.current = self._begin()
        if self.current is None:
            yield from super().__iter__()
            return
        own, rank = self.current, BALANCE.ranks.rank
        for batch in self._global_batches():
            rows = own.draw(len(batch))
            low = sum(rows[:rank])
            yield batch[low : low + rows[rank]]

    def _begin(self) -> Pass | None:
        """Also what is evaluated is gathered; only there in equal parts."""
        return BALANCE.begin_pass() if BALANCE.cuts_by_speed else None

    def _global_batches(self) -> Iterator[list[int]]:
        """The rows of each step over all ranks; the last ones are filled up from the beginning, as Accelerate does."""
        first: list[int] = []
        rows: list[int] = []
        size = self.batch_size * (1 if self.split_batches else self.num_processes)
        for batch in self.batch_sampler:
            rows = rows + list(batch)
            if len(first) < size:
                first = first + list(batch)
            if len(rows) >= size:
                yield rows
                rows = []
        if rows and not self.drop_last:
            while len(rows) < size:
                rows = rows + first
            yield rows[:size]


class ElasticShard(BalancedShard):
    """A part of the batches that the world had with which the run began; in other cells those of the present world."""

    @property
    def num_processes(self) -> int:
        """Whose batches make a global one."""
        return BALANCE.num_sharing

    @num_processes.setter
    def num_processes(self, _: int) -> None:
        """It follows the cell."""

    @property
    def process_index(self) -> int:
        """Which share is this rank's."""
        return BALANCE.ranks.rank

    @process_index.setter
    def process_index(self, _: int) -> None:
        """It follows the world."""

    def _begin(self) -> Pass | None:
        return BALANCE.begin_pass() if BALANCE.keeps_batches else super()._begin()


class _Delivery:
    """In place of a loader's `_update_state_dict`, which it calls before each batch, and once at the end."""

    def __init__(self, loader: DataLoaderShard) -> None:
        self._loader = weakref.ref(loader)
        self._draws_here = loader.num_workers == 0

    def __call__(self) -> None:
        loader = self._loader()
        if loader is None:
            return
        type(loader)._update_state_dict(loader)
        current = loader.base_dataloader.batch_sampler.current
        if current is not None and not loader.end_of_dataloader:
            BALANCE.delivered(current, current.deliver(self._draws_here))


class Balancer:
    """The shares of the present cell. One per process.

    Attributes:
        ranks: between which batches are shared.
        speed: of this rank.
    """

    def __init__(self) -> None:
        # Whether their gradients pass through here.
        self._models: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
        self.ranks = NO_RANKS
        self._clear()

    def _clear(self) -> None:
        self._weight = 1.0
        self._balance: Balance | None = None
        self._measures = self._has_given_up = self._is_apart = False
        self.speed = StepSpeed()
        self._num_passes = 0
        self._current: weakref.ref[Pass] | None = None
        self._modes: set[bool] = set()  # in which batches were handed out: whether a model was in training mode
        self._said: set[str] = set()

    @property
    def is_on(self) -> bool:
        """Whether ranks may have different numbers of rows in this cell."""
        return self._balance is not None

    @property
    def keeps_batches(self) -> bool:
        """Whether global batches are those of the world with which the run began."""
        return self._balance is not None and self.ranks.reference > 0 and not self._is_apart

    @property
    def reference(self) -> int:
        """Of the world with which an elastic run began; 0 in other cells."""
        return self.ranks.reference if self.keeps_batches else 0

    @property
    def num_sharing(self) -> int:
        """For how many ranks a loader's batches make a global one."""
        return self.reference or self.ranks.num

    @property
    def share_of_ranks(self) -> float:
        """How many times as many ranks an elastic run began with; 1 in other cells."""
        begun = self.ranks.reference if self.is_on else 0
        return (begun or self.ranks.num) / self.ranks.num

    @property
    def is_training(self) -> bool:
        """Whether a model is in training mode."""
        return any(model.training for model in list(self._models))

    @property
    def cuts_by_speed(self) -> bool:
        """Whether a pass that begins is trained on, and shares are worth something."""
        return self._measures and self.is_training and not self._has_given_up

    def begin(self, is_asked: bool, ranks: DataRanks) -> None:
        """A cell begins; `is_asked`: it balances."""
        self._clear()
        self.ranks = ranks
        self._measures = is_asked and ranks.num > 1
        if self._measures or ranks.reference:
            self._balance = Balance(ranks.num)
        self._hook_models()

    def close(self) -> None:
        """The cell has ended, however."""
        self._balance, self._weight = None, 1.0

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Who counts rows by the batch of a rank itself gets the batches of the present world meanwhile."""
        before, self._is_apart = self._is_apart, True
        try:
            yield
        finally:
            self._is_apart = before

    # --- models and loaders ---

    def add_model(self, model: torch.nn.Module) -> None:
        """DistributedDataParallel averages its gradients from now on."""
        self._models.setdefault(model, False)
        self._hook_models()

    def _hook_models(self) -> None:
        # Only where something is to be done: a call for each gradient is a good part of a step that is short.
        if not self._measures and self._weight == 1.0:
            return
        for model in [model for model, is_hooked in list(self._models.items()) if not is_hooked]:
            self._models[model] = True
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._weigh)

    def options_of(self, loader: Any, options: dict[str, Any]) -> dict[str, Any]:
        """With which options Accelerate prepares a loader, so that it can be cut for any number of ranks."""
        if not self.keeps_batches or isinstance(loader.dataset, IterableDataset) or options.get("dispatch_batches"):
            return options
        # For one process it would leave the loader as it is, and shuffle by another generator than for several.
        whole = loader.batch_size if options.get("split_batches") else 2
        return {**options, "num_processes": whole or 2, "process_index": 0}

    def adopt(self, loader: Any) -> None:
        """Accelerate has prepared a loader; one whose batches it cannot cut stays as it is, which is said."""
        if self._balance is None:
            return
        sampler: Any = getattr(getattr(loader, "base_dataloader", None), "batch_sampler", None)
        if type(sampler) is not BatchSamplerShard or not sampler.even_batches or sampler.batch_size is None:
            self._say_cannot_cut(type(loader).__name__)
            return
        if self.keeps_batches:
            self._check_size(sampler.batch_size * (1 if sampler.split_batches else self.ranks.reference))
        sampler.__class__ = ElasticShard if self.keeps_batches else BalancedShard
        loader._update_state_dict = _Delivery(loader)

    def _say_cannot_cut(self, kind: str) -> None:
        why = "a stream, batches of changing size, or even_batches=False"
        if self._measures:
            self._say(
                f"--balance: the rows of this {kind} cannot be shared out by speed ({why}): every rank gets the same "
                "number of them."
            )
        if self.keeps_batches:
            self._say(
                f"--elastic: the batches of this {kind} cannot be cut for another number of ranks ({why}): when the "
                "world is resized within a pass over it, the run begins anew. lc.data.load(...) loads data, also "
                "streams, for any number of ranks."
            )

    def _check_size(self, size: int) -> None:
        """What cannot be kept in a larger world is refused before training starts."""
        if size < self.ranks.most:
            raise UsageError(
                f"--elastic: a batch of {size} rows over all ranks (the batch_size of this loader, for the "
                f"{self.ranks.reference} that the run began with) leaves ranks without a row when there are "
                f"{self.ranks.most}: give a larger batch_size, or a smaller MAX."
            )
        sizes = range(self.ranks.least, self.ranks.most + 1)
        if self.ranks.must_be_even and (odd := [num for num in sizes if size % num]):
            raise UsageError(
                f"--elastic: under this plan every rank must have as many rows, and a batch of {size} rows over all "
                f"ranks cannot be cut evenly for {odd[0]} of them: give a batch_size that every number from MIN to MAX "
                "divides."
            )

    def begin_pass(self) -> Pass:
        """A loader begins whose batches are cut."""
        self._num_passes += 1
        return Pass(self._num_passes, self._copy())

    def _copy(self) -> Balance:
        assert self._balance is not None
        layers = (layer for model in list(self._models) for layer in model.modules())
        # Of one row no variance is known: such a layer would raise on a rank to which one is left.
        least = 2 if any(isinstance(layer, _BatchNorm) for layer in layers) else 1
        return Balance(self._balance.num_ranks, list(self._balance.weights), least)

    # --- a step ---

    def delivered(self, current: Pass, rows: list[int]) -> None:
        """A batch is about to be handed out, of which the ranks have so many rows."""
        self.speed.asks()
        if rows and self.is_training:
            self._current = weakref.ref(current)
            step = self.speed.step
            step.rows += rows[self.ranks.rank]
            step.num_batches += 1
            step.passes.add(current.number)
        self.note_rows(rows)

    def note_rows(self, rows: list[int]) -> None:
        """The batch that is handed out now has so many rows on each rank; nothing where all have as many.

        What is evaluated between a batch and its gradient does not count, unless nothing is ever in training mode.
        """
        is_training = self.is_training
        self._modes.add(is_training)
        if self._balance is None or not rows:
            self._weight = 1.0
        elif is_training or True not in self._modes:
            self.speed.step.last_rows = rows[self.ranks.rank]
            self._weight = rows[self.ranks.rank] * len(rows) / sum(rows)
            self._hook_models()
            self.speed.step.is_uneven |= len(set(rows)) > 1

    def count_items(self, num_items: torch.Tensor) -> None:
        """A Trainer has counted the items of all ranks, by which losses of this step may be divided."""
        self.speed.step.num_items = num_items

    def note_loss(self, losses: Any) -> None:
        """Gradients are about to be computed: of a mean over rows, or of a sum, of which they are no share.

        What a Trainer counts for its losses not every model and `compute_loss` uses. A compiled one does not show it.
        """
        step = self.speed.step
        if self._balance is None or step.has_sums:
            return
        kinds = [kind_of_loss(loss) for loss in losses if isinstance(loss, torch.Tensor)]
        if step.num_items is not None and any(kind.may_be_over(step.num_items) for kind in kinds):
            self._weight = 1.0
        elif any(kind.is_sum for kind in kinds):
            step.has_sums = True
        elif step.last_rows and not self._has_given_up:
            for count in [count for kind in kinds for count in kind.counts]:
                step.note_count(count / step.last_rows)

    def _weigh(self, gradient: torch.Tensor) -> torch.Tensor | None:
        if self._balance is None:
            return None
        self.speed.note_gradient()
        return gradient * self._weight if self._weight != 1.0 else None

    def after_step(self) -> None:
        """An optimizer has stepped, on every rank."""
        if self._balance is None or self._has_given_up:
            return
        if not self._measures:
            self._check_step()
        elif self.speed.after_step():
            self._exchange()

    def _check_step(self) -> None:
        """Of an elastic step: what of its batch cannot be kept is said.

        Batches of several loaders have one weight only where it is that of all ranks.
        """
        step, is_other = self.speed.next_step(), self.ranks.num != self.ranks.reference
        if not self._modes:
            self._say(
                "--elastic: the rows of this step came from no loader that accelerator.prepare() or lc.data.load() has "
                f"made in this cell: the batch of the {self.ranks.reference} ranks that the run began with does not "
                "stay when their number changes."
            )
        if is_other and self.speed.num_steps % EVERY == 1 and step.is_unlike:
            self._say(f"--elastic: {_UNLIKE}, and near that of the ranks that the run began with.")
        if step.has_sums and is_other:
            self._say(
                f"--elastic: {_SUM} Its gradient is not what it was on the {self.ranks.reference} ranks that the run "
                f"began with. {_TAKE_MEAN}"
            )
        if len(step.passes) > 1 and step.is_uneven:
            self._say(
                "--elastic: a step takes batches of several loaders, whose rows this number of ranks cannot share "
                "evenly: the gradient is weighed by the rows of the last one. Choose a batch_size that every number "
                "of ranks divides."
            )

    def _exchange(self) -> None:
        """Tell all ranks what was measured here; they come to one result."""
        current = self._current() if self._current is not None else None
        drawn, number = (current.drawn, current.number) if current is not None else (0, 0)
        window, self.speed.window = self.speed.window, StepMeasures()
        own = [window.seconds, window.rows, drawn, number, window.num_batches, window.is_mixed, window.has_sums]
        table = _gathered([*own, float(window.sum_of_counts)])
        seconds, rows, drawns, numbers, batches, mixed, sums, counts = (
            list(column) for column in zip(*table, strict=True)
        )
        assert self._balance is not None
        if len(set(self._balance.weights)) > 1 and max(counts) - min(counts) > MAX_ROUNDING * max(counts):
            self._say(f"--balance: {_UNLIKE}. With equal shares it is not equal to it either.")
        if any(mixed):
            self._give_up("a step takes batches of several loaders, whose rows would have to be weighed apart")
        elif any(sums):
            self._give_up(f"{_SUM} {_TAKE_MEAN}")
        elif not any(rows):
            self._give_up("no batches came from a loader that accelerator.prepare() was given in this cell")
        elif len(set(numbers)) > 1 or len(set(batches)) > 1 or not self._balance.observe(seconds, rows):
            return
        if current is not None:  # whole windows of accumulation have one weight
            every = max(1, int(batches[0]))
            current.change(-(-int(max(drawns)) // every) * every, self._copy())
        if self.ranks.rank == 0 and not self._has_given_up:
            shares = ", ".join(f"rank {rank}: {weight:.0%}" for rank, weight in enumerate(self._balance.weights))
            print(f"--balance: shares of each batch are now {shares}.")

    def _give_up(self, why: str) -> None:
        self._say(f"--balance has no effect in this cell: {why.rstrip('.')}. Every rank gets the same number of rows.")
        assert self._balance is not None
        self._balance.weights = [1.0] * self._balance.num_ranks
        self._has_given_up = True

    def _say(self, text: str) -> None:
        """Tell the user, once."""
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        if is_first and text not in self._said:
            print(text, file=sys.stderr)
        self._said.add(text)


def _gathered(own: list[Any]) -> list[list[float]]:
    """A row of numbers of every rank."""
    device = "cpu" if "gloo" in str(dist.get_backend()) else torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor(own, dtype=torch.float64, device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [[float(value) for value in row.tolist()] for row in found]


BALANCE = Balancer()


def install() -> None:
    """Look at what cells do whose batches are shared out. Called once, in a rank."""
    patches.LOSSES.apply(
        {
            "torch.autograd:_engine_run_backward": _make_backward,
            "torch.nn.parallel:DistributedDataParallel._pre_forward": _make_pre_forward,
        }
    )


def _make_backward(original: Any) -> Any:
    def _engine_run_backward(t_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not (BALANCE.is_on and kwargs.get("accumulate_grad")):  # else no gradient of a parameter comes of it
            return original(t_outputs, *args, **kwargs)
        BALANCE.note_loss(t_outputs)
        result = original(t_outputs, *args, **kwargs)
        BALANCE.speed.backward_ended()
        return result

    return _engine_run_backward


def _make_pre_forward(original: Any) -> Any:
    def _pre_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not BALANCE.is_on:
            return original(self, *args, **kwargs)
        began = time.perf_counter()
        result = original(self, *args, **kwargs)
        BALANCE.speed.waited(time.perf_counter() - began)
        return result

    return _pre_forward
