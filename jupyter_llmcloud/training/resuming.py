"""Where a cell is in its loops and its data, and how a cell that is executed again gets back to a saved place.

Every pass over a loader is followed by an `Iteration`. A place is saved just before an item is fetched, when the body
of the loop has ended: there the optimizer has stepped, the scheduler too, and the counters are counted. It is the same
moment that is looked for when the cell is executed again: until then loops throw away what they had finished (see
`loops`), loaders stand in for the batches that were used, and nothing that is logged or printed leaves the rank. Then
everything saved is restored, and the next batch is the one that would have come.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset, Sampler

from jupyter_llmcloud.training import randomness
from jupyter_llmcloud.training.loops import Loop, Loops

_NUMBER = "_llmcloud_number"
Position = dict[str, Any]


class ResumeMissed(RuntimeError):
    """The cell took another way than before and did not come back to the place it was to resume at."""


class Iteration:
    """One pass over a loader."""

    def __init__(self, place: Place, loader: Any, original: Callable[[Any], Iterator[Any]]) -> None:
        self.place = place
        self.loader = loader
        self.handed_out = 0
        self.ordinal = -1
        self.key = ""
        self.trained = False
        self.start: dict[str, Any] = {}
        self.rng_of_last_call: dict[str, Any] | None = None
        self.forward_to: Position | None = None
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

    def _forward(self, saved: Position) -> None:
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


class StepCount(Iteration):
    """A pass over the steps of `run.steps(total)`."""

    def __init__(self, place: Place, total: int) -> None:
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


class Place:
    """Where the cell of a rank is.

    Attributes:
        follows: whether the present cell is followed at all.
        replaying: on the way to the saved place.
        save, restore: called at the place itself; set by who knows what to save.
        soon: whether the place may be saved at the end of this turn.
        went_on: called when a pass that was under way beside the place is drawn from again.
    """

    def __init__(self) -> None:
        self.loops = Loops()
        self.follows = False
        self.replaying = False
        self.begun: dict[str, int] = {}  # passes begun over each loader; replaced, never changed
        self.save: Callable[[Position], None] = lambda position: None
        self.restore: Callable[[], None] = lambda: None
        self.soon: Callable[[], bool] = lambda: False
        self.went_on: Callable[[], None] = lambda: None
        self._num_cells = 0
        self._num_loaders = 0
        self._drawing: list[Iteration] = []
        self._clear(None)

    def _clear(self, saved: Position | None) -> None:
        self.loops.clear()
        self.begun = {}
        self._saved = saved
        self._pending: dict[str, Position] = {}
        self._loaders: dict[str, weakref.ref[Any]] = {}
        self._loader_states: dict[str, dict[str, Any]] = {}
        self._passes: list[weakref.ref[Iteration]] = []
        self._lengths: dict[str, dict[int, int]] = {}
        self._trained: dict[str, list[int]] = {}
        self._due: Callable[[], Loop | Iteration | None] | None = None
        self._last: Callable[[], Iteration | None] = lambda: None
        self._advance: tuple[Any, int, dict[str, Any] | None] | None = None
        self._matched: list[weakref.ref[Loop]] = []
        self._swallowing = False
        self._skips = False

    def begin_cell(self, follows: bool, saved: Position | None = None) -> None:
        """A new cell; `saved`: it must get back to this place."""
        self._num_cells += 1
        self._num_loaders = 0
        self._clear(saved)
        self.follows = follows
        self.replaying = saved is not None

    def end_cell(self) -> None:
        """The cell has come to its end. Raises ResumeMissed when it should have been resumed on the way."""
        self.follows = False
        if self.replaying:
            self.replaying = False
            raise ResumeMissed("the cell ended before it came to the place where it was to be resumed.")

    # --- when a place is saved ---

    def want_save(self) -> bool:
        """Save at the end of this turn of the loop that trains; False when no loop is known."""
        loop = self.loops.turning()
        target: Loop | Iteration | None = loop if loop is not None else self._last()
        self._due = weakref.ref(target) if target is not None else None
        return target is not None

    def note_step(self) -> None:
        """An optimizer has stepped: the pass whose batch it used was trained on."""
        last = self._last()
        if last is not None and not last.trained:
            last.trained = True
            self._trained.setdefault(last.key, []).append(last.ordinal)

    def _is_due(self, target: Loop | Iteration) -> bool:
        return self._due is not None and self._due() is target

    def before_item(self, loop: Loop) -> None:
        """A loop is about to fetch an item."""
        if self.replaying:
            self._lead(loop)
        elif self._is_due(loop):
            self._save_here({"kind": "loop", "path": self.loops.path(loop)})

    def before_batch(self, iteration: Iteration) -> None:
        """A loader is about to fetch a batch."""
        if self.replaying and self._is_point(iteration):
            self._arrive()
        elif self._is_due(iteration):
            point = {"key": iteration.key, "ordinal": iteration.ordinal}
            self._save_here({"kind": "loader", "path": self.loops.path(None), **point})
        if self.soon():
            iteration.rng_of_last_call = randomness.snapshot()

    def after_batch(self, iteration: Iteration) -> None:
        """A loader has delivered."""
        self._last = weakref.ref(iteration)
        self.loops.note_batch()

    def _save_here(self, point: Position) -> None:
        self._due = None
        self.save({**point, **self.describe()})

    def describe(self) -> Position:
        """The data side of the present place, in plain values."""
        alive = [item for item in self._alive() if item.handed_out and not item._ended]
        return {
            "begun": self.begun,
            "trained": self._trained,
            "lengths": self._lengths,
            "passes": {item.key: _position(item) for item in alive},
            "loaders": {key: order_of(loader) for key, ref in self._loaders.items() if (loader := ref()) is not None},
        }

    def _alive(self) -> list[Iteration]:
        return [item for ref in self._passes if (item := ref()) is not None and item.key]

    # --- passes over loaders ---

    def key_of(self, loader: Any) -> str:
        """A loader's name that is the same when the cell is executed again: the order in which they were made."""
        numbered = getattr(loader, "base_dataloader", loader)
        cell, number = getattr(numbered, _NUMBER, (0, 0))
        return f"new {number}" if cell == self._num_cells else f"old {cell} {number}"

    def number(self, loader: Any) -> None:
        """A loader has been made."""
        self._num_loaders += 1
        setattr(loader, _NUMBER, (self._num_cells, self._num_loaders))

    def begin(self, iteration: Iteration) -> None:
        """A pass begins."""
        iteration.key = "steps" if isinstance(iteration, StepCount) else self.key_of(iteration.loader)
        if not isinstance(iteration, StepCount):
            self._loaders[iteration.key] = weakref.ref(iteration.loader)
            if not self.replaying and (state := self._loader_states.pop(iteration.key, None)) is not None:
                set_loader(iteration.loader, state)
        iteration.ordinal = self.begun.get(iteration.key, 0)
        self.begun = {**self.begun, iteration.key: iteration.ordinal + 1}
        self._passes = [ref for ref in self._passes if ref() is not None]
        self._passes.append(weakref.ref(iteration))

    def finished(self, iteration: Iteration) -> None:
        """A pass has come to its end."""
        self._lengths.setdefault(iteration.key, {})[iteration.ordinal] = iteration.handed_out

    def drawing(self, iteration: Iteration) -> Drawing:
        """Loaders that begin in the block belong to this pass."""
        return Drawing(self._drawing, iteration)

    @property
    def is_drawing(self) -> bool:
        return bool(self._drawing)

    # --- on the way back ---

    def plan(self, iteration: Iteration) -> tuple[str, int]:
        """What a pass that begins does: "run", "nothing", "forward", or "stand in" for so many batches."""
        key, ordinal = iteration.key, iteration.ordinal
        if not self.replaying:
            return self._plan_after(key, ordinal)
        assert self._saved is not None
        if self._swallowing:
            return self._plan_swallowed(key, ordinal)
        if self._saved["kind"] != "loader":
            return "run", 0
        if key == self._saved["key"]:
            if ordinal > self._saved["ordinal"]:
                raise ResumeMissed(f"the loader has begun {ordinal + 1} passes without coming to its saved place.")
            if ordinal == self._saved["ordinal"]:
                return "forward", 0
        self._skips = self._skips or ordinal in self._saved["trained"].get(key, ())
        return ("nothing" if self._skips else "run"), 0

    def _plan_after(self, key: str, ordinal: int) -> tuple[str, int]:
        pending = self._pending.get(key)
        if pending is None or pending["ordinal"] != ordinal:
            return "run", 0
        return "forward", 0

    def _plan_swallowed(self, key: str, ordinal: int) -> tuple[str, int]:
        assert self._saved is not None
        saved = self._saved["passes"].get(key)
        if saved is not None and saved["ordinal"] == ordinal:
            # Steps count from nought by themselves; batches that were used are stood in for.
            return ("run", 0) if key == "steps" else ("forward", saved["handed_out"])
        length = self._saved["lengths"].get(key, {}).get(ordinal)
        return ("stand in", length) if length is not None else ("run", 0)

    def saved_pass(self, key: str) -> Position:
        """The saved place of a pass over this loader."""
        if key in self._pending:
            return self._pending.pop(key)
        assert self._saved is not None
        return dict(self._saved["passes"][key])

    def advance(self, loader: Any, number: int, rng: dict[str, Any] | None) -> None:
        """The next pass over this (inner) loader passes over `number` batches without reading them."""
        self._advance = (loader, number, rng)

    def advanced(self, loader: Any, source: Any) -> Any:
        """The iterator of an inner loader that has just been made."""
        if self._advance is None or self._advance[0] is not loader:
            return source
        _, number, rng = self._advance
        self._advance = None
        for _ in range(number):
            next(source._sampler_iter)
        return AdvancedBase(source, rng) if rng is not None else source

    def _is_point(self, iteration: Iteration) -> bool:
        saved = self._saved
        return (
            saved is not None
            and saved["kind"] == "loader"
            and (iteration.key, iteration.ordinal) == (saved["key"], saved["ordinal"])
        )

    def _lead(self, loop: Loop) -> None:
        assert self._saved is not None
        if self._swallowing:
            return  # a loop inside the source of the one that is led
        path = self._saved["path"]
        if any(ref() is loop for ref in self._matched):
            raise ResumeMissed("a loop of the cell came to its next item without passing the saved place.")
        depth = len(self._matched)
        if loop.delivered or depth == len(path) or not self._matches(loop, path[depth]):
            return
        self._matched.append(weakref.ref(loop))
        self.begun = self._begun_at(path[depth])
        is_last = depth == len(path) - 1 and self._saved["kind"] == "loop"
        self._swallowing = True
        try:
            loop.skip(path[depth]["delivered"] - (0 if is_last else 1))
        finally:
            self._swallowing = False
        if is_last:
            self._arrive()

    def _begun_at(self, element: Position) -> dict[str, int]:
        """Passes begun when the saved item was; one that was under way then and later will begin anew."""
        assert self._saved is not None
        passes = self._saved["passes"]
        return {
            key: min(number, passes[key]["ordinal"]) if key in passes else number
            for key, number in element["loaders"].items()
        }

    def _matches(self, loop: Loop, wanted: Position) -> bool:
        parent = self._matched[-1]() if self._matched else None
        before = parent.begun_at_body.get(loop.number, 0) if parent is not None else 0
        return loop.number == wanted["loop"] and loop.began - before == wanted["ordinal"]

    def _arrive(self) -> None:
        """The saved place is reached: from here on the cell runs as it would have."""
        assert self._saved is not None
        saved, self.replaying = self._saved, False
        self._trained = {key: list(ordinals) for key, ordinals in saved["trained"].items()}
        self._lengths = {key: dict(lengths) for key, lengths in saved["lengths"].items()}
        self._pending = {key: dict(position) for key, position in saved["passes"].items()}
        self.begun = {**saved["begun"], **{key: position["ordinal"] for key, position in self._pending.items()}}
        for item in self._alive():
            self._carry_over(item)
        self._loader_states = {key: state for key, state in saved["loaders"].items() if key not in saved["passes"]}
        self.restore()

    def _carry_over(self, item: Iteration) -> None:
        """A pass that has begun on the way is the saved one, or belongs to the past."""
        assert self._saved is not None
        wanted = self._pending.get(item.key)
        if wanted is not None and wanted["ordinal"] == item.ordinal:
            del self._pending[item.key]
            self.begun = {**self.begun, item.key: item.ordinal + 1}
            item.trained = item.ordinal in self._trained.get(item.key, ())
            if item.handed_out != wanted["handed_out"]:
                item.forward_to = wanted
        else:
            item.end()


class Drawing:
    """While a pass draws from its source."""

    __slots__ = ("_iteration", "_stack")

    def __init__(self, stack: list[Iteration], iteration: Iteration) -> None:
        self._stack = stack
        self._iteration = iteration

    def __enter__(self) -> None:
        self._stack.append(self._iteration)

    def __exit__(self, *_: Any) -> None:
        self._stack.pop()


def _position(iteration: Iteration) -> Position:
    return {
        "ordinal": iteration.ordinal,
        "handed_out": iteration.handed_out,
        "start": iteration.start,
        "rng_of_last_call": iteration.rng_of_last_call,
        "batch": batch_size(iteration.loader),
    }


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


def install(place: Place) -> None:
    """Follow every loader of this process while a cell is followed. Called once, in a rank."""
    original_init, original_backward = DataLoader.__init__, torch.autograd.backward

    @functools.wraps(original_backward)
    def backward(*args: Any, **kwargs: Any) -> None:
        if place.follows:
            place.loops.note_backward()
        original_backward(*args, **kwargs)

    torch.autograd.backward = backward

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        place.number(self)

    __init__.__doc__ = original_init.__doc__
    DataLoader.__init__ = __init__  # type: ignore[method-assign]
    for kind in (DataLoader, DataLoaderShard, DataLoaderDispatcher):
        _follow_passes(kind, place)


def _follow_passes(kind: Any, place: Place) -> None:
    original = kind.__iter__

    def __iter__(self: Any) -> Iterator[Any]:
        if place.is_drawing:
            return place.advanced(self, original(self))
        return Iteration(place, self, original) if place.follows else original(self)

    kind.__iter__ = __iter__
