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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch

from jupyter_llmcloud.training.resume.loops.instrumentation import LOOP_FUNCTION, WHILE_FUNCTION

_FAST_S = 0.01

Number = int | str  # of a loop: which of the cell it is; in other code with the name of that


class BodyStart(NamedTuple):
    """How things were when the body of a loop began.

    Attributes:
        loops: how often each loop had begun.
        passes: how many passes over each loader had begun.
        num_loaders: loaders made in the cell.
        rng: the random numbers; None in loops that iterate fast, which a snapshot would slow down.
        prepared: Accelerators of the cell, and what they have prepared.
    """

    loops: Mapping[Number, int]
    passes: Mapping[str, int]
    num_loaders: int
    rng: dict[str, Any] | None
    prepared: Sequence[weakref.ref[Any]] = ()


class LoopCursor(Protocol):
    """What a loop asks and tells the cursor that follows the cell."""

    follows: bool
    filename: str

    def before_item(self, loop: TrackedLoop | TrackedWhile) -> dict[str, Any] | None:
        """The loop comes for its next item; returns the saved position when its body is to be led there."""

    def begin_body(self, saved: dict[str, Any]) -> None:
        """The body on the way to the saved position begins."""

    def body_start(self, with_rng: bool) -> BodyStart:
        """How things are now."""

    def begun_outermost(self) -> None:
        """A loop begins with none round it."""


class _RunningLoop:
    """What is alike of both.

    Attributes:
        number: its name in the code.
        began: how many loops of this number began before.
        frame: the id of the frame that it runs in.
        delivered: iterations that have begun.
        in_body: an iteration runs, and no item is waited for.
        saw_backward: gradients were computed in the present iteration.
    """

    __slots__ = ("__weakref__", "_cursor", "began", "delivered", "frame", "in_body", "number", "saw_backward")

    def __init__(self, number: Number, began: int, frame: int, cursor: LoopCursor) -> None:
        self.number = number
        self.began = began
        self.frame = frame
        self.delivered = 0
        self.in_body = False
        self.saw_backward = False
        self._cursor = cursor


class TrackedLoop(_RunningLoop):
    """One running `for` loop.

    Attributes:
        fetches_data: its items come from a loader that is followed.
        at_begin: how things were when it began.
        body: how things were when its present iteration began.
    """

    __slots__ = ("_iterated_at", "_source", "at_begin", "body", "fetches_data")

    def __init__(self, source: Iterable[Any], number: Number, began: int, frame: int, cursor: LoopCursor) -> None:
        super().__init__(number, began, frame, cursor)
        self.fetches_data = False
        self.at_begin = cursor.body_start(False)
        self._source = iter(source)
        self.body = cursor.body_start(False)
        self._iterated_at = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.in_body = False
        led_to = self._cursor.before_item(self)
        item = next(self._source)
        if led_to is not None:
            self._cursor.begin_body(led_to)
        self.delivered += 1
        self.in_body = True
        self.saw_backward = False
        before, self._iterated_at = self._iterated_at, time.monotonic()
        self.body = self._cursor.body_start(self._iterated_at - before > _FAST_S)
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


class TrackedWhile(_RunningLoop):
    """One running `while` loop: an iteration has no item, so on the way back nothing has to be thrown away."""

    __slots__ = ("lines",)

    def __init__(self, number: Number, began: int, frame: int, cursor: LoopCursor, lines: tuple[int, int]) -> None:
        super().__init__(number, began, frame, cursor)
        self.lines = lines

    def iterate(self) -> bool:
        """The loop is about to look at its condition: it is at the end of an iteration, and before the next."""
        self.in_body = False
        self._cursor.before_item(self)
        self.delivered += 1
        self.in_body = True
        self.saw_backward = False
        return True

    def skip(self, number: int) -> None:
        """Count iterations that were made before."""
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

    def are_running(self) -> bool:
        """Whether there is one round the code that runs now."""
        return bool(self.nest() or self.whiles())

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

    def training_loop(self) -> TrackedLoop | None:
        """The `for` loop with whose body a step of the training ends: the innermost with data, or with a backward."""
        inside = [loop for loop in reversed(self.nest()) if loop.in_body]
        with_data = next((loop for loop in inside if loop.fetches_data), None)
        return with_data or next((loop for loop in inside if loop.saw_backward), None)

    def training_while(self) -> TrackedWhile | None:
        """The innermost `while` loop with whose body a step of the training ends."""
        return next((loop for loop in reversed(self.whiles()) if loop.in_body and loop.saw_backward), None)

    def not_made_again(self) -> set[int]:
        """Ids of what the finished iterations of the running loops have prepared: on the way back they are skipped."""
        found: set[int] = set()
        for loop in self.nest():
            before = {id(ref()) for ref in loop.at_begin.prepared}
            found |= {id(item) for ref in loop.body.prepared if (item := ref()) is not None and id(item) not in before}
        return found

    def path(self, last: TrackedLoop | TrackedWhile | None) -> list[dict[str, Any]]:
        """Where the cell is, in plain values: the loops that run round `last`, and it."""
        path: list[dict[str, Any]] = []
        before: Mapping[Number, int] = {}
        for loop in self.nest():
            path.append(
                {
                    "loop": loop.number,
                    "ordinal": loop.began - before.get(loop.number, 0),
                    "delivered": loop.delivered,
                    "loaders": loop.at_begin.passes if loop is last else loop.body.passes,
                    "num_loaders": loop.body.num_loaders,
                    "rng": None if loop is last else loop.body.rng,
                }
            )
            if loop is last:
                break
            before = loop.body.loops
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


def install(cursor: LoopCursor, loops: Loops) -> None:
    """Let code with tracked loops find the function that wraps them. Called once, in a rank."""

    def loop(iterable: Iterable[Any], number: int) -> Iterable[Any]:
        # While torch.compile traces, this is the constant True, and the iterable goes through untouched.
        if torch.compiler.is_compiling() or not cursor.follows:
            return iterable
        frame = sys._getframe(1)
        name = _name(frame, number, cursor.filename)
        if not loops.are_running():
            cursor.begun_outermost()
        tracked = TrackedLoop(iterable, name, loops.count(name), id(frame), cursor)
        loops.push(tracked)
        return tracked

    def begin_while(number: int, first: int, last: int) -> TrackedWhile | None:
        if torch.compiler.is_compiling() or not cursor.follows:
            return None
        frame = sys._getframe(1)
        name = f"while {_name(frame, number, cursor.filename)}"
        if not loops.are_running():
            cursor.begun_outermost()
        tracked = TrackedWhile(name, loops.count(name), id(frame), cursor, (first, last))
        loops.push_while(tracked)
        return tracked

    setattr(builtins, LOOP_FUNCTION, _as_builtin(loop, LOOP_FUNCTION))
    setattr(builtins, WHILE_FUNCTION, _as_builtin(begin_while, WHILE_FUNCTION))


def _as_builtin(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that pickles find by its name: dill, with which datasets compares functions, would look into it."""
    function.__module__, function.__qualname__, function.__name__ = "builtins", name, name
    return function


def _name(frame: FrameType, number: int, filename: str) -> Number:
    if frame.f_code.co_filename == filename:
        return number
    return f"{frame.f_globals.get('__name__')} {frame.f_code.co_name} {number}"
