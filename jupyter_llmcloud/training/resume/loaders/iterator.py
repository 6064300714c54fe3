"""Passes over loaders: followed while a cell runs, and led back to where they were when it is executed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset, Sampler

from jupyter_llmcloud.training.checkpoint import rng as randomness
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed

ReplayPosition = dict[str, Any]


class LoaderCursor(Protocol):
    """What a pass over a loader asks and tells the cursor that follows the cell."""

    replaying: bool

    def begin(self, iteration: TrackedIterator) -> None:
        """A pass begins: it is given its key and its ordinal."""

    def plan(self, iteration: TrackedIterator) -> tuple[str, int]:
        """What a pass that begins does: "run", "nothing", "forward", or "stand in" for so many batches."""

    def take_up(self, iteration: TrackedIterator) -> None:
        """A pass that began in an earlier cell is drawn from again."""

    def saved_pass(self, key: str) -> ReplayPosition:
        """Where the pass over this loader was."""

    def went_on(self) -> None:
        """A pass that was under way beside the saved place is drawn from again."""

    def before_batch(self, iteration: TrackedIterator) -> None:
        """The loop comes for its next batch."""

    def after_batch(self, iteration: TrackedIterator) -> None:
        """The loop is given a batch."""

    def finished(self, iteration: TrackedIterator) -> None:
        """A pass has delivered its last batch."""

    def drawing(self, iteration: TrackedIterator) -> AbstractContextManager[None]:
        """While inside, what the loader's own iterator draws counts as part of this pass."""

    def advance(self, loader: Any, number: int, rng: dict[str, Any] | None) -> None:
        """The next iterator of this loader begins after `number` batches."""

    def advanced(self, loader: Any, source: Any) -> Any:
        """The iterator of a loader, advanced where that was asked for."""


class TrackedIterator:
    """One pass over a loader."""

    def __init__(self, place: LoaderCursor, loader: Any, original: Callable[[Any], Iterator[Any]]) -> None:
        self.place = place
        self.loader = loader
        self.handed_out = 0
        self.ordinal = -1
        self.key = ""
        self.trained = False
        self.start: dict[str, Any] = {}
        self.rng_of_last_call: dict[str, Any] | None = None
        self.forward_to: ReplayPosition | None = None
        self._original = original
        self._source: Iterator[Any] | None = None
        self._stand_ins = 0
        self._stand_in: Any = None
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return len(self.loader)

    def __next__(self) -> Any:
        if self._source is None and not self._ended:
            self._begin()
        elif self.place.replaying:
            self.place.take_up(self)
        if self._stand_ins:
            self._stand_ins -= 1
            return self._stand_in
        if self.forward_to is not None:
            self._forward(self.forward_to)
            self.place.went_on()
        if self._ended:
            raise StopIteration
        self.place.before_batch(self)
        batch = self._draw()
        self.handed_out += 1
        self.place.after_batch(self)
        return batch

    def take_up(self, saved: ReplayPosition) -> None:
        """Go on as this saved pass."""
        self.forward_to, self._ended = saved, False

    def end(self) -> None:
        """Deliver nothing more: the saved place is in a later pass."""
        self._ended = True

    # --- beginning ---

    def _begin(self) -> None:
        self.place.begin(self)
        self.start = self.state()
        plan, number = self.place.plan(self)
        if plan == "nothing":
            self._ended = True
        elif plan == "stand in":
            self._begin_source()
            self._stand_in, self._stand_ins = self._first(), number
            self._ended = True
        elif plan == "forward":
            saved = self.place.saved_pass(self.key)
            self._forward(saved)
            self._stand_ins = number
            if not self.place.replaying:
                self.place.went_on()
        else:
            self._begin_source()

    def _first(self) -> Any:
        try:
            return self._draw()
        except StopIteration:
            return None

    def _begin_source(self) -> None:
        with self.place.drawing(self):
            self._source = iter(self.place.advanced(self.loader, self._original(self.loader)))

    def _draw(self) -> Any:
        assert self._source is not None
        try:
            with self.place.drawing(self):
                return next(self._source)
        except StopIteration:
            self._ended = True
            self.place.finished(self)
            raise

    def state(self) -> dict[str, Any]:
        """What decides the order of a pass that begins now."""
        return {"rng": randomness.snapshot(), **order_of(self.loader)}

    # --- getting back ---

    def _forward(self, saved: ReplayPosition) -> None:
        """Be where a saved pass was: the same order of samples, `handed_out` of them used."""
        self.forward_to = None
        if (size := batch_size(self.loader)) != saved["batch"]:
            raise ResumeMissed(
                f"the saved place counts batches of {saved['batch']} samples over all ranks, this loader makes "
                f"batches of {size}: change the size per rank so that the whole batch is as before."
            )
        now = randomness.snapshot()
        self.start = saved["start"]
        self.set_state(self.start)
        self._use_up(saved["handed_out"], saved["rng_of_last_call"])
        self.handed_out = saved["handed_out"]
        self.rng_of_last_call = saved["rng_of_last_call"]
        randomness.restore(now)

    def set_state(self, start: dict[str, Any]) -> None:
        """The order of the next pass is that of one which began in this state."""
        randomness.restore(start["rng"])
        set_loader(self.loader, start)

    def _use_up(self, number: int, rng_of_last_call: dict[str, Any] | None) -> None:
        is_shard = type(self.loader) is DataLoaderShard
        base = self.loader.base_dataloader if is_shard else self.loader
        if number and _draws_in_this_process(base):
            # What was used is passed over by the sampler and never read, but for the last batch, which stands in.
            self.place.advance(base, number - 1, rng_of_last_call if is_shard and number > 1 else None)
            number = 1
        self._begin_source()
        for _ in range(number):
            self._stand_in = self._draw()


class StepCount(TrackedIterator):
    """A pass over the steps of `run.steps(total)`."""

    def __init__(self, place: LoaderCursor, total: int) -> None:
        super().__init__(place, range(total), iter)

    def state(self) -> dict[str, Any]:
        return {}

    def set_state(self, start: dict[str, Any]) -> None:
        """Steps have no order to restore."""

    def _use_up(self, number: int, rng_of_last_call: dict[str, Any] | None) -> None:
        self._source = iter(range(number, len(self.loader)))

    def __next__(self) -> int:
        step: int = super().__next__()
        return step


class AdvancedBase:
    """The iterator of a prepared loader's inner loader: before its second item the generators are as they were then."""

    def __init__(self, source: Any, rng: dict[str, Any]) -> None:
        self._source = source
        self._rng: dict[str, Any] | None = rng
        self._num_drawn = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._num_drawn += 1
        if self._num_drawn == 2 and self._rng is not None:
            randomness.restore(self._rng)
            self._rng = None
        return next(self._source)


class Drawing:
    """While a pass draws from its source."""

    __slots__ = ("_iteration", "_stack")

    def __init__(self, stack: list[TrackedIterator], iteration: TrackedIterator) -> None:
        self._stack = stack
        self._iteration = iteration

    def __enter__(self) -> None:
        self._stack.append(self._iteration)

    def __exit__(self, *_: Any) -> None:
        self._stack.pop()


def position_of(iteration: TrackedIterator) -> ReplayPosition:
    return {
        "ordinal": iteration.ordinal,
        "handed_out": iteration.handed_out,
        "start": iteration.start,
        "rng_of_last_call": iteration.rng_of_last_call,
        "batch": batch_size(iteration.loader),
    }


def is_incomplete(iteration: TrackedIterator) -> bool:
    """Whether the random numbers of a batch that waits in a prepared loader would be other ones than they were."""
    waits = type(iteration.loader) is DataLoaderShard and iteration.handed_out > 1 and not iteration._ended
    return waits and iteration.rng_of_last_call is None


def order_of(loader: Any) -> dict[str, Any]:
    """The epoch and the generators of a loader."""
    generators = [generator.get_state() for generator in randomness.generators_of(loader)]
    epochs = [sampler.epoch for sampler in _with_epoch(loader)]
    return {"iteration": getattr(loader, "iteration", None), "generators": generators, "epochs": epochs}


def set_loader(loader: Any, state: dict[str, Any]) -> None:
    """The epoch and the generators of a loader as they were."""
    if state.get("iteration") is not None and hasattr(loader, "iteration"):
        loader.iteration = state["iteration"]
    for generator, value in zip(randomness.generators_of(loader), state.get("generators", ()), strict=False):
        generator.set_state(value)
    for sampler, epoch in zip(_with_epoch(loader), state.get("epochs", ()), strict=False):
        sampler.epoch = epoch


def _with_epoch(loader: Any) -> list[Any]:
    """Samplers that are told the epoch, like DistributedSampler."""
    parts = randomness.parts_of(loader)
    return [part for part in parts if isinstance(part, Sampler) and isinstance(getattr(part, "epoch", None), int)]


def batch_size(loader: Any) -> int:
    """Samples of one batch over all ranks; 0 when it cannot be told."""
    if isinstance(loader, range):
        return 1
    try:
        if type(loader) in (DataLoaderShard, DataLoaderDispatcher):
            return int(loader.total_batch_size)
        world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return int(loader.batch_size) * world_size
    except (AttributeError, TypeError):
        return 0


def _draws_in_this_process(loader: Any) -> bool:
    return (
        type(loader) is DataLoader
        and loader.num_workers == 0
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )
