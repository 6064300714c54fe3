"""Where a cell is in its loops and its data, and how a cell that is executed again gets back to a saved position.

Every pass over a loader is followed by a `TrackedIterator`. A position is saved just before an item is fetched, when
the body of the loop has ended: there the optimizer has stepped, the scheduler too, and the counters are counted. It is
the same moment that is looked for when the cell is executed again: until then loops throw away what they had finished
(see `loops`), loaders stand in for the batches that were used, and nothing that is logged or printed leaves the rank.
Then everything saved is restored, and the next batch is the one that would have come.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from jupyter_llmcloud.training.checkpoint import rng as randomness
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.resume.loaders.iterator import ReplayPosition, TrackedIterator, TrackedSteps
from jupyter_llmcloud.training.resume.loaders.passes import PassHistory
from jupyter_llmcloud.training.resume.loaders.registry import LoaderRegistry
from jupyter_llmcloud.training.resume.loaders.source import InnerIterators, StepSource
from jupyter_llmcloud.training.resume.loops.tracking import BodyStart, Loops, TrackedLoop, TrackedWhile
from jupyter_llmcloud.training.resume.replay_target import ReplayTarget, Where
from jupyter_llmcloud.training.resume.trainer_resume import Training, Trainings

SaveTarget = TrackedLoop | TrackedWhile | TrackedIterator | Training  # at the end of whose iteration is saved


class CellObserver(Protocol):
    """Knows what to save of a cell; the cursor knows where and when."""

    def save(self, position: dict[str, Any], complete: bool = True) -> bool:
        """The cell is at a position to save. Returns False to be called again at the end of the next iteration."""

    def restore(self) -> None:
        """The cell is at the saved position: put back what was saved there."""

    def is_soon(self) -> bool:
        """Whether the position may be saved at the end of this iteration; asked once a batch."""

    def before_backward(self) -> None:
        """Gradients are about to be computed."""

    def after_batch(self) -> None:
        """A loader has delivered."""

    def where(self) -> Where:
        """Which functions of the cell run, and where in their code they are."""

    def begun_loop(self) -> None:
        """A loop begins with none round it."""

    def begun_pass(self) -> None:
        """A pass over a loader begins."""

    def prepared(self) -> Sequence[weakref.ref[Any]]:
        """The Accelerators of the cell, and what they have prepared; asked for once an iteration of every loop."""

    def went_on(self) -> None:
        """A pass that was under way beside the saved position is drawn from again."""


class ReplayCursor:
    """Where the cell of a rank is.

    Attributes:
        loops, loaders, passes, trainings: what the cell is in.
        inner: the iterators that are no passes of their own.
        follows: whether the present cell is followed at all.
        filename: of the cell.
    """

    def __init__(self, observer: CellObserver) -> None:
        self._observer = observer
        self.loops = Loops()
        self.loaders = LoaderRegistry()
        self.passes = PassHistory()
        self.inner = InnerIterators()
        self.trainings = Trainings(self, self.loops, self.passes, self.loaders, self.inner)
        self.follows = False
        self.filename = ""
        self._target: ReplayTarget | None = None  # until it is reached
        self._due: Callable[[], SaveTarget | None] | None = None
        self._due_key = ""

    @property
    def replaying(self) -> bool:
        """Whether the cell is on its way to the saved position."""
        return self._target is not None

    def begin_cell(self, follows: bool, saved: ReplayPosition | None, filename: str) -> None:
        """A new cell; `saved`: it must get back to this position."""
        self.filename = filename
        self.loops.clear()
        self.loaders.begin_cell()
        self.passes.clear()
        self.inner.clear()
        self.trainings.clear(saved)
        self.follows = follows
        self._target = ReplayTarget(saved) if saved is not None else None
        self._due, self._due_key = None, ""

    def end_cell(self) -> None:
        """The cell has come to its end. Raises ResumeMissed when it should have been resumed on the way."""
        self.follows = False
        if self._target is not None:
            self._target = None
            raise ResumeMissed("the cell ended before it came to the place where it was to be resumed.")

    def close(self) -> None:
        """Let go of the cell, however it has ended."""
        self.follows = False
        self._target = None
        self.trainings.clear(None)

    # --- when a position is saved ---

    def want_save(self) -> bool:
        """Save at the end of this iteration of the loop that trains; False when no loop is known."""
        loops = self.loops
        candidates = self.trainings.active, loops.training_loop(), self.passes.last, loops.training_while()
        # By identity: a pass over a stream has no length, by which its truth would be told.
        target: SaveTarget | None = next((found for found in candidates if found is not None), None)
        self._due = weakref.ref(target) if target is not None else None
        self._due_key = target.key if isinstance(target, TrackedIterator) else ""
        return target is not None

    def note_step(self) -> None:
        """An optimizer has stepped."""
        self.passes.note_step()

    def note_backward(self) -> None:
        """Gradients are about to be computed."""
        self._observer.before_backward()
        self.loops.note_backward()

    def _is_due(self, target: SaveTarget) -> bool:
        return self._due is not None and self._due() is target

    def _is_after_due(self, iterator: TrackedIterator) -> bool:
        """A library that counts its batches leaves a pass without asking for more, and begins the next one."""
        return self._due is not None and iterator.handed_out == 0 and iterator.key == self._due_key

    def before_item(self, loop: TrackedLoop | TrackedWhile) -> ReplayPosition | None:
        """A loop is about to fetch an item. Returns its saved position when the item is that of a body to run again."""
        if self._target is not None:
            return self._lead(loop, self._target)
        if self._is_due(loop):
            self._save_here({"kind": "loop", "path": self.loops.path(loop)})
        return None

    def begin_body(self, saved: ReplayPosition) -> None:
        """The body that runs finds things as it did before; those of the items before it were not run again."""
        self.loaders.num_made = saved["num_loaders"]
        if saved["rng"] is not None:
            randomness.restore(saved["rng"])

    def body_start(self, with_rng: bool) -> BodyStart:
        """How things are now."""
        rng = randomness.snapshot() if with_rng else None
        return BodyStart(self.loops.begun, self.passes.begun, self.loaders.num_made, rng, self._observer.prepared())

    def begun_outermost(self) -> None:
        """A loop begins with none round it."""
        self._observer.begun_loop()

    def before_batch(self, iterator: TrackedIterator) -> None:
        """A loader is about to fetch a batch."""
        training = self.trainings.active
        if self._target is not None and self._is_reached_by(iterator, self._target):
            self._arrive(self._target)
        elif training is not None and self._is_due(training) and iterator.loader is training.loader:
            point = {"training": self.trainings.point(training, iterator)}
            self._save_at(iterator, {"kind": "training", **point})
        elif self._is_due(iterator) or self._is_after_due(iterator):
            self._save_at(iterator, {"kind": "loader", "where": self._observer.where()})
        iterator.rng_of_last_call = randomness.snapshot() if self._observer.is_soon() else None

    def after_batch(self, iterator: TrackedIterator) -> None:
        """A loader has delivered."""
        self.passes.note_batch(iterator)
        self._observer.after_batch()
        self.loops.note_batch()

    def _save_at(self, iterator: TrackedIterator, point: ReplayPosition) -> None:
        point |= {"path": self.loops.path(None), "key": iterator.key, "ordinal": iterator.ordinal}
        self._save_here(point, iterator)

    def _save_here(self, point: ReplayPosition, iterator: TrackedIterator | None = None) -> None:
        position = {**point, **self.describe()}
        if iterator is not None:
            position["passes"][iterator.key] = iterator.position()
        if self._observer.save(position, not any(item.is_incomplete for item in self.passes.alive())):
            self._due = None

    def describe(self) -> ReplayPosition:
        """The data side of the present position, in plain values."""
        return {
            **self.trainings.describe(),
            **self.passes.describe(),
            "num_loaders": self.loaders.num_made,
            "persistent": any(self._has_old_workers(key, loader) for key, loader in self.loaders.used().items()),
            "loaders": self.loaders.orders(),
        }

    def _has_old_workers(self, key: str, loader: Any) -> bool:
        """Whether worker processes go on from an earlier pass, with random numbers that only they know."""
        return bool(getattr(loader, "persistent_workers", False)) and not self.passes.is_in_first(key)

    # --- passes over loaders ---

    def count_steps(self, total: int) -> Iterator[int]:
        """The steps from 0 to `total`; in a cell that is followed, as a pass."""
        return TrackedSteps(self, StepSource(total, self.inner)) if self.follows else iter(range(total))

    def made(self, iterator: TrackedIterator) -> None:
        """Somebody has an iterator; its pass begins when it is drawn from."""
        self.passes.made(iterator)

    def _key_of(self, iterator: TrackedIterator) -> str:
        return "steps" if isinstance(iterator, TrackedSteps) else self.loaders.key_of(iterator.loader)

    def begin(self, iterator: TrackedIterator) -> None:
        """A pass begins."""
        iterator.key = self._key_of(iterator)
        if not isinstance(iterator, TrackedSteps):
            self.loaders.use(iterator.loader)
            if not self.replaying:
                self.loaders.restore_order(iterator.key)
        if self._is_taken_up_by(iterator):
            self.lead_to_pass()
        self.passes.begin(iterator)
        self._observer.begun_pass()

    def went_on(self) -> None:
        """A pass that was under way beside the saved position is drawn from again."""
        self._observer.went_on()

    def finished(self, iterator: TrackedIterator) -> None:
        """A pass has come to its end."""
        self.passes.finished(iterator)

    # --- on the way back ---

    def plan(self, iterator: TrackedIterator) -> tuple[str, int]:
        """What a pass that begins does: "run", "nothing", "forward", or "stand in" for so many batches."""
        key, ordinal = iterator.key, iterator.ordinal
        if self._target is None:
            return ("forward" if self.passes.is_pending(key, ordinal) else "run"), 0
        return self._target.plan(key, ordinal, lambda: self._is_taken_up_by(iterator))

    def lead_to_pass(self) -> None:
        """The next pass over the loader of the saved position is the saved one."""
        assert self._target is not None
        self.passes.next_is(*self._target.saved_pass)

    def _is_taken_up_by(self, iterator: TrackedIterator) -> bool:
        """Whether the code is where the next batch was asked for by hand when the position was saved."""
        target = self._target
        if target is None or not target.is_by_hand(iterator.key):
            return False
        return target.is_here(self.loops.path(None), self._observer.where)

    def take_up(self, iterator: TrackedIterator) -> None:
        """A pass that has begun becomes the saved one when its next batch is asked for at the saved position."""
        if iterator.forward_to is None and self._is_taken_up_by(iterator):
            self.lead_to_pass()
            iterator.ordinal = self.passes.count(iterator.key)
            iterator.take_up(self.saved_pass(iterator.key))

    def saved_pass(self, key: str) -> ReplayPosition:
        """Where the pass over this loader was when the cell was saved."""
        if (pending := self.passes.take_pending(key)) is not None:
            return pending
        assert self._target is not None
        return self._target.pass_position(key)

    def _is_reached_by(self, iterator: TrackedIterator, target: ReplayTarget) -> bool:
        return target.is_reached_by(iterator.key, iterator.ordinal, lambda: self._is_taken_up_by(iterator))

    def _lead(self, loop: TrackedLoop | TrackedWhile, target: ReplayTarget) -> ReplayPosition | None:
        element = target.enter(loop)
        if element is None:
            return None
        self.passes.begun = target.begun_at(element)
        if target.skip(loop, element):
            self._arrive(target)
            return None
        return element

    def _arrive(self, target: ReplayTarget) -> None:
        """The saved position is reached: from here on the cell runs as it would have."""
        saved, self._target = target.position, None
        self.passes.restore(saved, self._key_of)
        taken_up = saved["passes"].keys() - self.passes.inherited  # with the order that they began with
        orders = {key: order for key, order in saved["loaders"].items() if key not in taken_up}
        self.loaders.restore(saved["num_loaders"], orders)
        self._observer.restore()
