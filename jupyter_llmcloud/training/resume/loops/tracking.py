"""The loops of a cell that run: which they are, how far they are, and how to get back there.

At any moment the running loops, outermost first, and the number of items each has delivered say where the cell is. A
`while` loop counts where nothing else tells a step from the next. On the way back, each loop of a saved position throws
away the items it had finished without running its body, and delivers the one it was at.
"""

from __future__ import annotations

import builtins
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch

from jupyter_llmcloud.training.checkpoint import rng
from jupyter_llmcloud.training.resume.loops.instrumentation import LOOP_FUNCTION, WHILE_FUNCTION

_FAST_S = 0.01

Number = int | str  # of a loop: its place in the cell; in other code with the name of that


class LoopCursor(Protocol):
    """What a loop asks and tells the cursor that follows the cell."""

    loops: Loops
    follows: bool
    filename: str
    begun: dict[str, int]
    num_loaders: int

    def before_item(self, loop: TrackedLoop | TrackedWhile) -> dict[str, Any] | None:
        """The loop comes for its next item; returns the saved place when its body is to be led there."""

    def begin_body(self, saved: dict[str, Any]) -> None:
        """The body on the way to the saved place begins."""


class TrackedLoop:
    """One running `for` loop."""

    __slots__ = (
        "__weakref__", "_place", "_source", "_started", "began", "begun_at_body", "delivered", "fetches_data", "frame",
        "in_body", "loaders_at_begin", "loaders_at_body", "number", "numbered_at_body", "rng_at_body", "saw_backward",
        "turned_at",
    )  # fmt: skip

    def __init__(self, source: Iterable[Any], number: Number, place: LoopCursor, frame: int) -> None:
        self.loaders_at_begin = self.loaders_at_body = place.begun  # how often each loader has begun by then
        self.began = place.loops.count(number)
        self.begun_at_body = place.loops.begun
        self._source = iter(source)
        self._place = place
        self.number = number
        self.frame = frame
        self.delivered = 0
        self.in_body = False
        self.fetches_data = False  # its items come from a loader that is followed
        self.saw_backward = False  # in the body that runs now
        self.numbered_at_body = place.num_loaders
        self.rng_at_body: dict[str, Any] | None = None
        self.turned_at = 0.0
        place.loops.push(self)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.in_body = False
        led_to = self._place.before_item(self)
        item = next(self._source)
        if led_to is not None:
            self._place.begin_body(led_to)
        self.delivered += 1
        self.in_body = True
        self.saw_backward = False
        self.begun_at_body = self._place.loops.begun
        self.loaders_at_body = self._place.begun
        self.numbered_at_body = self._place.num_loaders
        turned_at, self.turned_at = self.turned_at, time.monotonic()
        # Loops that turn fast hold no training of their own; a snapshot would slow them down.
        self.rng_at_body = rng.snapshot() if self.turned_at - turned_at > _FAST_S else None
        return item

    @property
    def source(self) -> Iterator[Any]:
        """What it iterates over."""
        return self._source

    def skip(self, number: int) -> None:
        """Throw away this many items; raises StopIteration when there are fewer."""
        for _ in range(number):
            next(self._source)
            self.delivered += 1


class TrackedWhile:
    """One running `while` loop: a turn has no item, so on the way back nothing has to be thrown away."""

    __slots__ = ("__weakref__", "_place", "began", "delivered", "frame", "in_body", "lines", "number", "saw_backward")

    def __init__(self, number: Number, place: LoopCursor, frame: int, lines: tuple[int, int]) -> None:
        self.began = place.loops.count(number)
        self._place = place
        self.number = number
        self.frame = frame
        self.lines = lines
        self.delivered = 0
        self.in_body = False
        self.saw_backward = False
        place.loops.push_while(self)

    def turn(self) -> bool:
        """The loop is about to look at its condition: it is at the end of a turn, and before the next."""
        self.in_body = False
        self._place.before_item(self)
        self.delivered += 1
        self.in_body = True
        self.saw_backward = False
        return True

    def skip(self, number: int) -> None:
        """Count turns that were made before."""
        self.delivered += number


class Loops:
    """The running loops of a cell. A loop that was left by `break` or an error drops out by itself."""

    def __init__(self) -> None:
        self._running: list[weakref.ref[TrackedLoop]] = []
        self._whiles: list[weakref.ref[TrackedWhile]] = []
        self.begun: dict[Number, int] = {}  # how often each loop has begun; replaced, never changed

    def clear(self) -> None:
        """A new cell."""
        self._running = []
        self._whiles = []
        self.begun = {}

    def count(self, number: Number) -> int:
        """One more loop of this number begins; returns how many have begun before."""
        before = self.begun.get(number, 0)
        self.begun = {**self.begun, number: before + 1}
        return before

    def push(self, loop: TrackedLoop) -> None:
        """A loop has begun."""
        self._running = [ref for ref in self._running if ref() is not None]
        self._running.append(weakref.ref(loop))

    def push_while(self, loop: TrackedWhile) -> None:
        """A `while` loop has begun."""
        self._whiles = [ref for ref in self._whiles if ref() is not None]
        self._whiles.append(weakref.ref(loop))

    def whiles(self) -> list[TrackedWhile]:
        """The `while` loops round the code that runs now, outermost first."""
        lines = _frames()
        running = [loop for ref in self._whiles if (loop := ref()) is not None and loop.frame in lines]
        return [loop for loop in running if loop.lines[0] <= lines[loop.frame] <= loop.lines[1]]

    def nest(self) -> list[TrackedLoop]:
        """The loops round the code that runs now, outermost first; not those of generators that are suspended."""
        frames = _frames()
        running = [loop for ref in self._running if (loop := ref()) is not None]
        return [loop for loop in running if loop.frame in frames]

    def note_batch(self) -> None:
        """A loader delivers: the outermost loop that waits for an item draws data."""
        for loop in self.nest():
            if not loop.in_body:
                loop.fetches_data = True
                return

    def note_backward(self) -> None:
        """Gradients are computed in the bodies that run now."""
        loops: list[TrackedLoop | TrackedWhile] = [*self.nest(), *self.whiles()]
        for loop in loops:
            loop.saw_backward = loop.in_body

    def turning(self) -> TrackedLoop | None:
        """The `for` loop with whose body a step of the training ends: the innermost with data, or with a backward."""
        inside = [loop for loop in reversed(self.nest()) if loop.in_body]
        with_data = next((loop for loop in inside if loop.fetches_data), None)
        return with_data or next((loop for loop in inside if loop.saw_backward), None)

    def turning_while(self) -> TrackedWhile | None:
        """The innermost `while` loop with whose body a step of the training ends."""
        return next((loop for loop in reversed(self.whiles()) if loop.in_body and loop.saw_backward), None)

    def path(self, last: TrackedLoop | TrackedWhile | None) -> list[dict[str, Any]]:
        """Where the cell is, in plain values: the loops that run round `last`, and it."""
        path: list[dict[str, Any]] = []
        before: dict[Number, int] = {}
        for loop in self.nest():
            path.append(
                {
                    "loop": loop.number,
                    "ordinal": loop.began - before.get(loop.number, 0),
                    "delivered": loop.delivered,
                    "loaders": loop.loaders_at_begin if loop is last else loop.loaders_at_body,
                    "num_loaders": loop.numbered_at_body,
                    "rng": None if loop is last else loop.rng_at_body,
                }
            )
            if loop is last:
                break
            before = loop.begun_at_body
        if isinstance(last, TrackedWhile):
            ordinal = last.began - before.get(last.number, 0)
            path.append({"loop": last.number, "ordinal": ordinal, "delivered": last.delivered, "loaders": {}})
        return path


def _frames() -> dict[int, int]:
    """The line of each frame that runs, by its id; a frame that is kept by its own variable would keep the loops."""
    found = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found[id(frame)] = frame.f_lineno
        frame = frame.f_back
    return found


def install(place: LoopCursor) -> None:
    """Let code with tracked loops find the function that wraps them. Called once, in a rank."""

    def loop(iterable: Iterable[Any], number: int) -> Iterable[Any]:
        # While torch.compile traces, this is the constant True, and the iterable goes through untouched.
        if torch.compiler.is_compiling() or not place.follows:
            return iterable
        frame = sys._getframe(1)
        return TrackedLoop(iterable, _name(frame, number, place.filename), place, id(frame))

    def begin_while(number: int, first: int, last: int) -> TrackedWhile | None:
        if torch.compiler.is_compiling() or not place.follows:
            return None
        frame = sys._getframe(1)
        return TrackedWhile(f"while {_name(frame, number, place.filename)}", place, id(frame), (first, last))

    setattr(builtins, LOOP_FUNCTION, loop)
    setattr(builtins, WHILE_FUNCTION, begin_while)


def _name(frame: FrameType, number: int, filename: str) -> Number:
    if frame.f_code.co_filename == filename:
        return number
    return f"{frame.f_globals.get('__name__')} {frame.f_code.co_name} {number}"
