"""The `for` loops of a cell: which are running, how far they are, and how to get back there.

The loops of a cell that can be resumed are compiled with their iterable in a `Loop`. At any moment the running loops,
outermost first, and the number of items each has delivered say where the cell is. On the way back, each loop of a
saved place throws away the items it had finished without running its body, and delivers the one it was at.
"""

from __future__ import annotations

import ast
import builtins
import sys
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jupyter_llmcloud.training.resuming import Place

LOOP_FUNCTION = "__llmcloud_loop__"


class WrapLoops(ast.NodeTransformer):
    """Makes `for x in y` into `for x in __llmcloud_loop__(y, number)` while `active`."""

    def __init__(self) -> None:
        self.active = False
        self._number = 0

    def visit_Module(self, node: ast.Module) -> ast.Module:
        if self.active:
            self._number = 0
            self.generic_visit(node)
        return node

    def visit_For(self, node: ast.For) -> ast.For:
        number = self._number
        self._number += 1
        self.generic_visit(node)
        function = ast.copy_location(ast.Name(LOOP_FUNCTION, ast.Load()), node.iter)
        constant = ast.copy_location(ast.Constant(number), node.iter)
        node.iter = ast.copy_location(ast.Call(function, [node.iter, constant], []), node.iter)
        return node


class Loop:
    """One running `for` loop."""

    __slots__ = (
        "__weakref__", "_place", "_source", "_started", "began", "begun_at_body", "delivered", "fetches_data", "frame",
        "in_body", "loaders_at_begin", "loaders_at_body", "number", "saw_backward",
    )  # fmt: skip

    def __init__(self, source: Iterable[Any], number: int, place: Place, frame: int) -> None:
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
        place.loops.push(self)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.in_body = False
        self._place.before_item(self)
        item = next(self._source)
        self.delivered += 1
        self.in_body = True
        self.saw_backward = False
        self.begun_at_body = self._place.loops.begun
        self.loaders_at_body = self._place.begun
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


class Loops:
    """The running loops of a cell. A loop that was left by `break` or an error drops out by itself."""

    def __init__(self) -> None:
        self._running: list[weakref.ref[Loop]] = []
        self.begun: dict[int, int] = {}  # how often each loop has begun; replaced, never changed

    def clear(self) -> None:
        """A new cell."""
        self._running = []
        self.begun = {}

    def count(self, number: int) -> int:
        """One more loop of this number begins; returns how many have begun before."""
        before = self.begun.get(number, 0)
        self.begun = {**self.begun, number: before + 1}
        return before

    def push(self, loop: Loop) -> None:
        """A loop has begun."""
        self._running = [ref for ref in self._running if ref() is not None]
        self._running.append(weakref.ref(loop))

    def nest(self) -> list[Loop]:
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
        for loop in self.nest():
            loop.saw_backward = loop.in_body

    def turning(self) -> Loop | None:
        """The loop with whose body a step of the training ends: the innermost that draws data or saw a backward."""
        inside = [loop for loop in reversed(self.nest()) if loop.in_body]
        with_data = next((loop for loop in inside if loop.fetches_data), None)
        return with_data or next((loop for loop in inside if loop.saw_backward), None)

    def path(self, last: Loop | None) -> list[dict[str, Any]]:
        """Where the cell is, in plain values: the loops that run round `last`, and it."""
        path: list[dict[str, Any]] = []
        before: dict[int, int] = {}
        for loop in self.nest():
            path.append(
                {
                    "loop": loop.number,
                    "ordinal": loop.began - before.get(loop.number, 0),
                    "delivered": loop.delivered,
                    "loaders": loop.loaders_at_begin if loop is last else loop.loaders_at_body,
                }
            )
            if loop is last:
                break
            before = loop.begun_at_body
        return path


def _frames() -> set[int]:
    found = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found.add(id(frame))
        frame = frame.f_back
    return found


def install(place: Place) -> None:
    """Let compiled cells find the function that wraps their loops."""

    def loop(iterable: Iterable[Any], number: int) -> Iterable[Any]:
        return Loop(iterable, number, place, id(sys._getframe(1))) if place.follows else iterable

    setattr(builtins, LOOP_FUNCTION, loop)
