"""Where a cell is in its loops and its data, and how a cell that is executed again gets back to a saved place.

Every pass over a loader is followed by an `Iteration`. A place is saved just before an item is fetched, when the body
of the loop has ended: there the optimizer has stepped, the scheduler too, and the counters are counted. It is the same
moment that is looked for when the cell is executed again: until then loops throw away what they had finished (see
`loops`), loaders stand in for the batches that were used, and nothing that is logged or printed leaves the rank. Then
everything saved is restored, and the next batch is the one that would have come.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from jupyter_llmcloud.training.checkpoint import rng as randomness
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.resume.loaders.iterator import (
    AdvancedBase,
    Drawing,
    ReplayPosition,
    StepCount,
    TrackedIterator,
    is_incomplete,
    order_of,
    position_of,
    set_loader,
)
from jupyter_llmcloud.training.resume.loops.tracking import Loops, TrackedLoop, TrackedWhile
from jupyter_llmcloud.training.resume.trainer_resume import Training, Trainings

_NUMBER = "_llmcloud_number"


class CellObserver(Protocol):
    """Knows what to save of a cell; the cursor knows where and when."""

    def save(self, position: dict[str, Any], complete: bool = True) -> bool:
        """The cell is at a place to save. Returns False to be called again at the end of the next iteration."""

    def restore(self) -> None:
        """The cell is at the saved place: put back what was saved there."""

    def is_soon(self) -> bool:
        """Whether the place may be saved at the end of this iteration; asked once a batch."""

    def before_backward(self) -> None:
        """Gradients are about to be computed."""

    def where(self) -> list[tuple[str, str]]:
        """Which functions of the cell run, and where in their code they are."""

    def begun_pass(self) -> None:
        """A pass over a loader begins."""

    def went_on(self) -> None:
        """A pass that was under way beside the saved place is drawn from again."""


class ReplayCursor:
    """Where the cell of a rank is.

    Attributes:
        follows: whether the present cell is followed at all.
        replaying: on the way to the saved place.
    """

    def __init__(self, observer: CellObserver) -> None:
        self._observer = observer
        self.loops = Loops()
        self.trainings = Trainings(self)
        self.follows = False
        self.replaying = False
        self.filename = ""  # of the cell
        self.num_backwards = 0  # how often gradients were computed
        self.num_batches = 0  # delivered
        self.begun: dict[str, int] = {}  # passes begun over each loader; replaced, never changed
        self._num_cells = 0
        self.num_loaders = 0
        self._drawing: list[TrackedIterator] = []
        self._clear(None)

    def _clear(self, saved: ReplayPosition | None) -> None:
        self.loops.clear()
        self.trainings.clear(saved)
        self.begun = {}
        self._saved = saved
        self._pending: dict[str, ReplayPosition] = {}
        self._loaders: dict[str, weakref.ref[Any]] = {}
        self._loader_states: dict[str, dict[str, Any]] = {}
        self._passes: list[weakref.ref[TrackedIterator]] = []
        self._lengths: dict[str, dict[int, int]] = {}
        self._trained: dict[str, list[int]] = {}
        self._due: Callable[[], TrackedLoop | TrackedWhile | TrackedIterator | Training | None] | None = None
        self._due_key = ""
        self._last: Callable[[], TrackedIterator | None] = lambda: None
        self._advance: tuple[Any, int, dict[str, Any] | None] | None = None
        self._matched: list[weakref.ref[TrackedLoop | TrackedWhile]] = []
        self._swallowing = False
        self._skips = False

    def begin_cell(self, follows: bool, saved: ReplayPosition | None, filename: str) -> None:
        """A new cell; `saved`: it must get back to this place."""
        self.filename = filename
        self._num_cells += 1
        self.num_loaders = 0
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
        loops = self.loops
        target: TrackedLoop | TrackedWhile | TrackedIterator | Training | None = (
            self.trainings.active or loops.turning() or self._last() or loops.turning_while()
        )
        self._due = weakref.ref(target) if target is not None else None
        self._due_key = target.key if isinstance(target, TrackedIterator) else ""
        return target is not None

    def note_step(self) -> None:
        """An optimizer has stepped: the pass whose batch it used was trained on."""
        last = self._last()
        if last is not None and not last.trained:
            last.trained = True
            self._trained.setdefault(last.key, []).append(last.ordinal)

    def note_backward(self) -> None:
        """Gradients are about to be computed."""
        self._observer.before_backward()
        self.num_backwards += 1
        self.loops.note_backward()

    def _is_due(self, target: TrackedLoop | TrackedWhile | TrackedIterator | Training) -> bool:
        return self._due is not None and self._due() is target

    def _is_after_due(self, iteration: TrackedIterator) -> bool:
        """A library that counts its batches leaves a pass without asking for more, and begins the next one."""
        return self._due is not None and iteration.handed_out == 0 and iteration.key == self._due_key

    def before_item(self, loop: TrackedLoop | TrackedWhile) -> ReplayPosition | None:
        """A loop is about to fetch an item. Returns its saved place when the item is that of a body to run again."""
        if self.replaying:
            return self._lead(loop)
        if self._is_due(loop):
            self._save_here({"kind": "loop", "path": self.loops.path(loop)})
        return None

    def begin_body(self, saved: ReplayPosition) -> None:
        """The body that runs finds things as it did before; those of the items before it were not run again."""
        self.num_loaders = saved["num_loaders"]
        if saved["rng"] is not None:
            randomness.restore(saved["rng"])

    def before_batch(self, iteration: TrackedIterator) -> None:
        """A loader is about to fetch a batch."""
        training = self.trainings.active
        if self.replaying and self._is_point(iteration):
            self._arrive()
        elif training is not None and self._is_due(training) and iteration.loader is training.loader:
            point = {"training": self.trainings.point(training, iteration)}
            self._save_at(iteration, {"kind": "training", **point})
        elif self._is_due(iteration) or self._is_after_due(iteration):
            self._save_at(iteration, {"kind": "loader", "where": self._observer.where()})
        iteration.rng_of_last_call = randomness.snapshot() if self._observer.is_soon() else None

    def after_batch(self, iteration: TrackedIterator) -> None:
        """A loader has delivered."""
        self._last = weakref.ref(iteration)
        self.num_batches += 1
        self.loops.note_batch()

    def _save_at(self, iteration: TrackedIterator, point: ReplayPosition) -> None:
        point |= {"path": self.loops.path(None), "key": iteration.key, "ordinal": iteration.ordinal}
        self._save_here(point, iteration)

    def _save_here(self, point: ReplayPosition, iteration: TrackedIterator | None = None) -> None:
        position = {**point, **self.describe()}
        if iteration is not None:
            position["passes"][iteration.key] = position_of(iteration)
        if self._observer.save(position, not any(is_incomplete(item) for item in self._alive())):
            self._due = None

    def describe(self) -> ReplayPosition:
        """The data side of the present place, in plain values."""
        alive = [item for item in self._alive() if item.handed_out and not item._ended]
        return {
            **self.trainings.describe(),
            "begun": self.begun,
            "num_loaders": self.num_loaders,
            "trained": self._trained,
            "lengths": self._lengths,
            "passes": {item.key: position_of(item) for item in alive},
            "persistent": any(self._has_old_workers(key, ref()) for key, ref in self._loaders.items()),
            "loaders": {key: order_of(loader) for key, ref in self._loaders.items() if (loader := ref()) is not None},
        }

    def _has_old_workers(self, key: str, loader: Any) -> bool:
        """Whether worker processes go on from an earlier pass, with random numbers that only they know."""
        is_first = self.begun[key] == 1 and any(item.key == key and not item._ended for item in self._alive())
        return bool(getattr(loader, "persistent_workers", False)) and not is_first

    def _alive(self) -> list[TrackedIterator]:
        return [item for ref in self._passes if (item := ref()) is not None and item.key]

    # --- passes over loaders ---

    def loaders(self) -> list[Any]:
        """The loaders over which a pass has begun."""
        return [loader for ref in self._loaders.values() if (loader := ref()) is not None]

    def key_of(self, loader: Any) -> str:
        """A loader's name that is the same when the cell is executed again: the order in which they were made."""
        numbered = getattr(loader, "base_dataloader", loader)
        cell, number = getattr(numbered, _NUMBER, (0, 0))
        return f"new {number}" if cell == self._num_cells else f"old {cell} {number}"

    def number(self, loader: Any) -> None:
        """A loader has been made."""
        self.num_loaders += 1
        setattr(loader, _NUMBER, (self._num_cells, self.num_loaders))

    def begin(self, iteration: TrackedIterator) -> None:
        """A pass begins."""
        iteration.key = "steps" if isinstance(iteration, StepCount) else self.key_of(iteration.loader)
        if not isinstance(iteration, StepCount):
            self._loaders[iteration.key] = weakref.ref(iteration.loader)
            if not self.replaying and (state := self._loader_states.pop(iteration.key, None)) is not None:
                set_loader(iteration.loader, state)
        if self.wants(iteration):
            self.lead_to_pass()
        iteration.ordinal = self.begun.get(iteration.key, 0)
        self.begun = {**self.begun, iteration.key: iteration.ordinal + 1}
        self._passes = [ref for ref in self._passes if ref() is not None]
        self._passes.append(weakref.ref(iteration))
        self._observer.begun_pass()

    def went_on(self) -> None:
        """A pass that was under way beside the saved place is drawn from again."""
        self._observer.went_on()

    def finished(self, iteration: TrackedIterator) -> None:
        """A pass has come to its end."""
        self._lengths.setdefault(iteration.key, {})[iteration.ordinal] = iteration.handed_out

    def drawing(self, iteration: TrackedIterator) -> Drawing:
        """Loaders that begin in the block belong to this pass."""
        return Drawing(self._drawing, iteration)

    @property
    def is_drawing(self) -> bool:
        return bool(self._drawing)

    # --- on the way back ---

    def plan(self, iteration: TrackedIterator) -> tuple[str, int]:
        """What a pass that begins does: "run", "nothing", "forward", or "stand in" for so many batches."""
        key, ordinal = iteration.key, iteration.ordinal
        if not self.replaying:
            return self._plan_after(key, ordinal)
        assert self._saved is not None
        if self._swallowing:
            return self._plan_swallowed(key, ordinal)
        if self._saved["kind"] == "loop":
            return "run", 0
        if key == self._saved["key"]:
            if ordinal > self._saved["ordinal"]:
                raise ResumeMissed(f"the loader has begun {ordinal + 1} passes without coming to its saved place.")
            if ordinal == self._saved["ordinal"] and (self._saved["kind"] == "training" or self.wants(iteration)):
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

    def lead_to_pass(self) -> None:
        """The next pass over the loader of the saved place is the saved one."""
        assert self._saved is not None
        self.begun = {**self.begun, self._saved["key"]: self._saved["ordinal"]}

    def wants(self, iteration: TrackedIterator) -> bool:
        """Whether the code is where the next batch was asked for by hand when the place was saved."""
        saved = self._saved
        if not self.replaying or saved is None or saved["kind"] != "loader" or iteration.key != saved["key"]:
            return False
        here, there = self.loops.path(None), saved["path"]
        same_loops = [(e["loop"], e["ordinal"]) for e in here] == [(e["loop"], e["ordinal"]) for e in there]
        return same_loops and self._observer.where() == [tuple(entry) for entry in saved["where"]]

    def take_up(self, iteration: TrackedIterator) -> None:
        """A pass that has begun becomes the saved one when its next batch is asked for at the saved place."""
        if self.replaying and iteration.forward_to is None and self.wants(iteration):
            self.lead_to_pass()
            iteration.ordinal = self.begun[iteration.key]
            self.begun = {**self.begun, iteration.key: iteration.ordinal + 1}
            iteration.take_up(self.saved_pass(iteration.key))

    def saved_pass(self, key: str) -> ReplayPosition:
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

    def _is_point(self, iteration: TrackedIterator) -> bool:
        saved = self._saved
        return (
            saved is not None
            and (saved["kind"] == "training" or self.wants(iteration))
            and (iteration.key, iteration.ordinal) == (saved["key"], saved["ordinal"])
        )

    def _lead(self, loop: TrackedLoop | TrackedWhile) -> ReplayPosition | None:
        assert self._saved is not None
        if self._swallowing:
            return None  # a loop inside the source of the one that is led
        path = self._saved["path"]
        if any(ref() is loop for ref in self._matched):
            raise ResumeMissed("a loop of the cell came to its next item without passing the saved place.")
        depth = len(self._matched)
        if loop.delivered or depth == len(path) or not self._matches(loop, path[depth]):
            return None
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
            return None
        element: ReplayPosition = path[depth]
        return element

    def _begun_at(self, element: ReplayPosition) -> dict[str, int]:
        """Passes begun when the saved item was; one that was under way then and later will begin anew."""
        assert self._saved is not None
        passes = self._saved["passes"]
        return {
            key: min(number, passes[key]["ordinal"]) if key in passes else number
            for key, number in element["loaders"].items()
        }

    def _matches(self, loop: TrackedLoop | TrackedWhile, wanted: ReplayPosition) -> bool:
        parent = self._matched[-1]() if self._matched else None
        before = parent.begun_at_body.get(loop.number, 0) if isinstance(parent, TrackedLoop) else 0
        return loop.number == wanted["loop"] and loop.began - before == wanted["ordinal"]

    def _arrive(self) -> None:
        """The saved place is reached: from here on the cell runs as it would have."""
        assert self._saved is not None
        saved, self.replaying = self._saved, False
        self._trained = {key: list(ordinals) for key, ordinals in saved["trained"].items()}
        self._lengths = {key: dict(lengths) for key, lengths in saved["lengths"].items()}
        self._pending = {key: dict(position) for key, position in saved["passes"].items()}
        self.num_loaders = saved["num_loaders"]
        self.begun = {**saved["begun"], **{key: position["ordinal"] for key, position in self._pending.items()}}
        for item in self._alive():
            self._carry_over(item)
        self._loader_states = {key: state for key, state in saved["loaders"].items() if key not in saved["passes"]}
        self._observer.restore()

    def _carry_over(self, item: TrackedIterator) -> None:
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
