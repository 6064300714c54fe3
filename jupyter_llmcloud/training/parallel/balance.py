"""`--balance`: each rank takes as many rows of a global batch as suit its speed, and the gradient stays the same.

A prepared loader cuts every global batch, which is the one it would have been without this, by the shares of now. The
gradients of a rank are weighed by its rows before DistributedDataParallel averages them, so that their mean is that of
the whole batch. Speed is what a rank needs from the moment it asks for a batch until its last gradient is there: what
it waits for others comes behind that.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard

from jupyter_llmcloud.core.parallel.balance import Balance

EVERY = 8  # steps between two exchanges of what was measured
WARM_UP = 2  # steps that are not measured


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
        self.current = BALANCE.begin_pass()
        if self.current is None:
            yield from super().__iter__()
            return
        own = self.current
        for batch in self._global_batches():
            rows = own.draw(len(batch))
            low = sum(rows[: self.process_index])
            yield batch[low : low + rows[self.process_index]]

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


class _Step:
    """What was measured since an optimizer stepped, or since an exchange.

    Attributes:
        seconds, rows: of this rank.
        num_batches: of the last step.
        passes: from which they came.
        is_mixed: whether a step took batches of several passes.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.rows = 0
        self.num_batches = 0
        self.passes: set[int] = set()
        self.is_mixed = False

    def add(self, step: _Step) -> None:
        """One more step."""
        self.seconds += step.seconds
        self.rows += step.rows
        self.num_batches = step.num_batches
        self.is_mixed |= len(step.passes) > 1


class Balancer:
    """The shares of the present cell. One per process."""

    def __init__(self) -> None:
        # Whether their gradients pass through here.
        self._models: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
        self._last_gradient = self._asked = 0.0
        self._weight = 1.0
        self._balance: Balance | None = None
        self._begin_measuring()

    def _begin_measuring(self) -> None:
        self._window = _Step()
        self._step = _Step()
        self._num_passes = self._num_steps = 0
        self._current: weakref.ref[Pass] | None = None
        self._has_gradients = self._has_given_up = False

    @property
    def is_on(self) -> bool:
        """Whether this cell balances."""
        return self._balance is not None

    def begin(self, is_on: bool, world_size: int) -> None:
        """A cell begins."""
        self._balance = Balance(world_size) if is_on and world_size > 1 else None
        self._weight = 1.0
        self._begin_measuring()
        for model in list(self._models) if self.is_on else ():
            self._hook(model)

    def close(self) -> None:
        """The cell has ended, however."""
        self._balance, self._weight = None, 1.0

    # --- models and loaders ---

    def add_model(self, model: torch.nn.Module) -> None:
        """DistributedDataParallel averages its gradients from now on."""
        self._models.setdefault(model, False)
        if self.is_on:
            self._hook(model)

    def _hook(self, model: torch.nn.Module) -> None:
        if self._models[model]:
            return
        self._models[model] = True
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._weigh)

    def adopt(self, loader: Any) -> None:
        """Accelerate has prepared a loader; one whose batches it cannot cut stays as it is, which is said."""
        if self._balance is None:
            return
        sampler: Any = getattr(getattr(loader, "base_dataloader", None), "batch_sampler", None)
        if type(sampler) is not BatchSamplerShard or not sampler.even_batches or sampler.batch_size is None:
            say(
                f"--balance: the rows of this {type(loader).__name__} cannot be shared out by speed (a stream, batches "
                "of changing size, or even_batches=False): every rank gets the same number of them."
            )
            return
        sampler.__class__ = BalancedShard
        loader._update_state_dict = _Delivery(loader)

    def begin_pass(self) -> Pass | None:
        """A loader begins; None when nothing is trained: what is evaluated is gathered in equal parts."""
        if self._balance is None or self._has_given_up or not any(model.training for model in list(self._models)):
            return None
        self._num_passes += 1
        return Pass(self._num_passes, self._copy())

    def _copy(self) -> Balance:
        assert self._balance is not None
        return Balance(self._balance.num_ranks, list(self._balance.weights))

    # --- a step ---

    def delivered(self, current: Pass, rows: list[int]) -> None:
        """A batch is about to be handed out, of which the ranks have so many rows."""
        self._count_time()
        self._asked = time.perf_counter()
        if not rows or self._balance is None:
            self._weight = 1.0
            return
        own = rows[dist.get_rank()]
        self._weight = own * len(rows) / sum(rows)
        self._current = weakref.ref(current)
        self._step.rows += own
        self._step.num_batches += 1
        self._step.passes.add(current.number)

    def is_weighed(self) -> None:
        """The losses of the batches that were delivered are weighed over all ranks already, as a Trainer does it."""
        self._weight = 1.0

    def _weigh(self, gradient: torch.Tensor) -> torch.Tensor | None:
        if self._balance is None:
            return None
        self._last_gradient = time.perf_counter()
        self._has_gradients = True
        return gradient * self._weight if self._weight != 1.0 else None

    def _count_time(self) -> None:
        if self._asked and self._last_gradient > self._asked:
            self._step.seconds += self._last_gradient - self._asked
        self._asked = 0.0

    def after_step(self) -> None:
        """An optimizer has stepped, on every rank."""
        if self._balance is None or self._has_given_up or not self._has_gradients:
            return
        self._count_time()
        self._num_steps += 1
        step, self._step, self._has_gradients = self._step, _Step(), False
        if self._num_steps <= WARM_UP:
            return
        self._window.add(step)
        if (self._num_steps - WARM_UP) % EVERY == 0:
            self._exchange()

    def _exchange(self) -> None:
        """Tell all ranks what was measured here; they come to one result."""
        current = self._current() if self._current is not None else None
        drawn, number = (current.drawn, current.number) if current is not None else (0, 0)
        window, self._window = self._window, _Step()
        own = [window.seconds, window.rows, drawn, number, window.num_batches, window.is_mixed]
        table = _gathered(own)
        seconds, rows, drawns, numbers, batches, mixed = (list(column) for column in zip(*table, strict=True))
        assert self._balance is not None
        if any(mixed):
            self._give_up("a step takes batches of several loaders, whose rows would have to be weighed apart")
        elif not any(rows):
            self._give_up("no batches came from a loader that accelerator.prepare() was given in this cell")
        elif len(set(numbers)) > 1 or len(set(batches)) > 1 or not self._balance.observe(seconds, rows):
            return
        if current is not None:  # whole windows of accumulation have one weight
            every = max(1, int(batches[0]))
            current.change(-(-int(max(drawns)) // every) * every, self._copy())
        if dist.get_rank() == 0 and not self._has_given_up:
            shares = ", ".join(f"rank {rank}: {weight:.0%}" for rank, weight in enumerate(self._balance.weights))
            print(f"--balance: shares of each batch are now {shares}.")

    def _give_up(self, why: str) -> None:
        say(f"--balance has no effect in this cell: {why}. Every rank gets the same number of rows.")
        assert self._balance is not None
        self._balance.weights = [1.0] * self._balance.num_ranks
        self._has_given_up = True


def say(text: str) -> None:
    """Tell the user, once."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr)


def _gathered(own: list[Any]) -> list[list[float]]:
    """A row of numbers of every rank."""
    device = "cpu" if "gloo" in str(dist.get_backend()) else torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor(own, dtype=torch.float64, device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [[float(value) for value in row.tolist()] for row in found]


BALANCE = Balancer()
