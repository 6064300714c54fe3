"""The passes over loaders that a cell has made: how many, how long they were, which of them were trained on."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from jupyter_llmcloud.training.resume.loaders.iterator import ReplayPosition, TrackedIterator


class PassHistory:
    """The passes of the present cell, and of a saved one those that are still to be taken up.

    Attributes:
        begun: how many passes over each loader have begun, by its key; replaced, never changed, so that others may keep
            it as it is now.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A new cell."""
        self.begun: dict[str, int] = {}
        self._alive: list[weakref.ref[TrackedIterator]] = []
        self._last: Callable[[], TrackedIterator | None] = lambda: None
        self._lengths: dict[str, dict[int, int]] = {}
        self._trained: dict[str, set[int]] = {}
        self._pending: dict[str, ReplayPosition] = {}
        self._unused: list[weakref.ref[TrackedIterator]] = []  # iterators that were not drawn from yet
        self._heirs: dict[str, weakref.WeakSet[TrackedIterator]] = {}  # who alone may take up a pending pass

    # --- as they are made ---

    def count(self, key: str) -> int:
        """One more begins; returns how many have begun before."""
        ordinal = self.begun.get(key, 0)
        self.begun = {**self.begun, key: ordinal + 1}
        return ordinal

    def next_is(self, key: str, ordinal: int) -> None:
        """The next one over this loader is counted as this one."""
        self.begun = {**self.begun, key: ordinal}

    def made(self, iterator: TrackedIterator) -> None:
        """Somebody has an iterator; its pass begins when it is drawn from."""
        self._unused = [*self._unused_refs(), weakref.ref(iterator)]

    def _unused_refs(self) -> list[weakref.ref[TrackedIterator]]:
        return [ref for ref in self._unused if (item := ref()) is not None and not item.key]

    def begin(self, iterator: TrackedIterator) -> None:
        """A pass begins."""
        self._forget_lost()
        pending = self._pending.get(iterator.key)
        if pending is not None and iterator in self._heirs.get(iterator.key, ()):
            iterator.ordinal = pending["ordinal"]
        else:
            iterator.ordinal = self.count(iterator.key)
        self._alive = [ref for ref in self._alive if ref() is not None]
        self._alive.append(weakref.ref(iterator))

    def note_batch(self, iterator: TrackedIterator) -> None:
        """A pass has delivered."""
        self._last = weakref.ref(iterator)

    def note_step(self) -> None:
        """An optimizer has stepped: the pass whose batch it used was trained on."""
        if (last := self._last()) is not None:
            self._trained.setdefault(last.key, set()).add(last.ordinal)

    def finished(self, iterator: TrackedIterator) -> None:
        """A pass has come to its end."""
        self._lengths.setdefault(iterator.key, {})[iterator.ordinal] = iterator.handed_out

    @property
    def last(self) -> TrackedIterator | None:
        """The one that has delivered last, while it is alive."""
        return self._last()

    def alive(self) -> list[TrackedIterator]:
        """Those that somebody may draw from."""
        return [item for ref in self._alive if (item := ref()) is not None and item.key]

    def is_in_first(self, key: str) -> bool:
        """Whether the first pass over a loader is under way."""
        return self.begun.get(key) == 1 and any(item.key == key and not item.ended for item in self.alive())

    # --- saved and restored ---

    def describe(self) -> ReplayPosition:
        """In plain values."""
        self._forget_lost()
        under_way = [item for item in self.alive() if item.handed_out and not item.ended]
        return {
            "begun": self.begun,
            "trained": {key: sorted(ordinals) for key, ordinals in self._trained.items()},
            "lengths": self._lengths,
            "passes": {**self._pending, **{item.key: item.position() for item in under_way}},
        }

    def restore(self, saved: ReplayPosition, key_of: Callable[[TrackedIterator], str]) -> None:
        """Be as `describe` says. Passes that have begun meanwhile are the saved ones, or belong to the past.

        An iterator that code has got on the way and has not drawn from is the one of the pass that was under way. One
        that it gets later begins a new pass then.
        """
        self._trained = {key: {*map(int, ordinals)} for key, ordinals in saved["trained"].items()}
        self._lengths = {key: dict(lengths) for key, lengths in saved["lengths"].items()}
        self._pending = {key: dict(position) for key, position in saved["passes"].items()}
        self._heirs = {}
        for item in [item for ref in self._unused_refs() if (item := ref()) is not None]:
            if (key := key_of(item)) in self._pending:
                self._heirs.setdefault(key, weakref.WeakSet()).add(item)
        nobodys = {key: position["ordinal"] for key, position in self._pending.items() if key not in self._heirs}
        self.begun = {**saved["begun"], **nobodys}
        for item in self.alive():
            self._carry_over(item)

    @property
    def inherited(self) -> set[str]:
        """The loaders over which a pass was under way that somebody waits to go on with."""
        return {key for key in self._heirs if key in self._pending}

    def _forget_lost(self) -> None:
        """A pass that was under way, and whose iterator nobody has any more."""
        for key in [key for key, heirs in self._heirs.items() if not len(heirs)]:
            del self._heirs[key]
            self._pending.pop(key, None)

    def _carry_over(self, item: TrackedIterator) -> None:
        wanted = self._pending.get(item.key)
        if wanted is not None and wanted["ordinal"] == item.ordinal:
            del self._pending[item.key]
            self.next_is(item.key, item.ordinal + 1)
            if item.handed_out != wanted["handed_out"]:
                item.forward_to = wanted
        else:
            item.end()

    def is_pending(self, key: str, ordinal: int) -> bool:
        """Whether a pass that begins is one that was under way when the cell was saved."""
        pending = self._pending.get(key)
        return pending is not None and pending["ordinal"] == ordinal

    def take_pending(self, key: str) -> ReplayPosition | None:
        """Where the pass over this loader was that is to be taken up; None when there is none."""
        return self._pending.pop(key, None)
