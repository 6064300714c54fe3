"""The saved position that a cell is led back to, and what the passes over loaders that begin on the way have to do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.resume.loaders.iterator import ReplayPosition
from jupyter_llmcloud.training.resume.loops.tracking import TrackedLoop, TrackedWhile

Where = list[tuple[str, str]]  # which functions run, and which of their instructions


class ReplayTarget:
    """A position of one of three kinds, while it is not reached.

    It is before an item of a loop ("loop"), before a batch that code asks for by hand ("loader"), or before a batch of
    a Trainer's training ("training"). In each case the loops of its path are entered one after the other.
    """

    def __init__(self, position: ReplayPosition) -> None:
        self.position = position
        self._entered: list[weakref.ref[TrackedLoop | TrackedWhile]] = []  # of its path, outermost first
        self._skipping = False  # a loop throws away the items that it had finished
        self._has_trained = False  # a pass has begun that was trained on: it and later ones have ended by then

    # --- loops ---

    def enter(self, loop: TrackedLoop | TrackedWhile) -> ReplayPosition | None:
        """A loop comes for an item. Returns its element of the path when it is the next loop of that."""
        if self._skipping:
            return None  # inside the source of the one that is led
        path = self.position["path"]
        if any(ref() is loop for ref in self._entered):
            raise ResumeMissed("a loop of the cell came to its next item without passing the saved place.")
        depth = len(self._entered)
        if loop.delivered or depth == len(path) or not self._is_next(loop, path[depth]):
            return None
        self._entered.append(weakref.ref(loop))
        element: ReplayPosition = path[depth]
        return element

    def _is_next(self, loop: TrackedLoop | TrackedWhile, wanted: ReplayPosition) -> bool:
        parent = self._entered[-1]() if self._entered else None
        before = parent.body.loops.get(loop.number, 0) if isinstance(parent, TrackedLoop) else 0
        return bool(loop.number == wanted["loop"] and loop.began - before == wanted["ordinal"])

    def skip(self, loop: TrackedLoop | TrackedWhile, element: ReplayPosition) -> bool:
        """Have a loop that was entered throw away what it had finished; returns whether the position is reached."""
        is_reached = len(self._entered) == len(self.position["path"]) and self.position["kind"] == "loop"
        self._skipping = True
        try:
            loop.skip(element["delivered"] - (0 if is_reached else 1))
        finally:
            self._skipping = False
        return is_reached

    def begun_at(self, element: ReplayPosition) -> dict[str, int]:
        """Passes begun when the saved item was; one that was under way then and later will begin anew."""
        passes = self.position["passes"]
        return {
            key: min(number, passes[key]["ordinal"]) if key in passes else number
            for key, number in element["loaders"].items()
        }

    # --- passes ---

    @property
    def saved_pass(self) -> tuple[str, int]:
        """(key, ordinal) of the pass before whose batch the position is; ("", -1) when it is before a loop's item."""
        return self.position.get("key", ""), self.position.get("ordinal", -1)

    def is_by_hand(self, key: str) -> bool:
        """Whether code asks by hand for the batch of this loader that the position is before."""
        return bool(self.position["kind"] == "loader" and key == self.position["key"])

    def is_here(self, path: Sequence[Mapping[str, Any]], where: Callable[[], Where]) -> bool:
        """Whether the code is where the batch was asked for by hand."""
        there = [(element["loop"], element["ordinal"]) for element in self.position["path"]]
        if [(element["loop"], element["ordinal"]) for element in path] != there:
            return False
        return where() == [tuple(entry) for entry in self.position["where"]]

    def plan(self, key: str, ordinal: int, is_here: Callable[[], bool]) -> tuple[str, int]:
        """What a pass that begins does: "run", "nothing", "forward", or "stand in" for so many batches."""
        if self._skipping:
            return self._plan_skipped(key, ordinal)
        if self.position["kind"] == "loop":
            return "run", 0
        saved_key, saved_ordinal = self.saved_pass
        if key == saved_key:
            if ordinal > saved_ordinal:
                raise ResumeMissed(f"the loader has begun {ordinal + 1} passes without coming to its saved place.")
            if ordinal == saved_ordinal and (self.position["kind"] == "training" or is_here()):
                return "forward", 0
        self._has_trained = self._has_trained or ordinal in self.position["trained"].get(key, ())
        return ("nothing" if self._has_trained else "run"), 0

    def _plan_skipped(self, key: str, ordinal: int) -> tuple[str, int]:
        saved = self.position["passes"].get(key)
        if saved is not None and saved["ordinal"] == ordinal:
            # Steps count from nought by themselves; batches that were used are stood in for.
            return ("run", 0) if key == "steps" else ("forward", saved["handed_out"])
        length = self.position["lengths"].get(key, {}).get(ordinal)
        return ("stand in", length) if length is not None else ("run", 0)

    def pass_position(self, key: str) -> ReplayPosition:
        """Where the pass over this loader was."""
        return dict(self.position["passes"][key])

    def is_reached_by(self, key: str, ordinal: int, is_here: Callable[[], bool]) -> bool:
        """Whether the position is before the batch that this pass is about to fetch."""
        if (key, ordinal) != self.saved_pass:
            return False
        return self.position["kind"] == "training" or is_here()
