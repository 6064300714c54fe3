"""The loops of a cell: which are running, how far they are, and how to get back there.

In a cell that is tracked, the `for` loops of cells, and of the user's own modules, have their iterable in a
`TrackedLoop`; a `while` loop asks a `TrackedWhile` at each turn, which counts where nothing else tells a step from the
next. At any moment the running loops, outermost first, and the number of items each has delivered say where the cell
is. On the way back, each loop of a saved place throws away the items it had finished without running its body, and
delivers the one it was at. In every other cell, and in whatever leaves the rank, functions have the code that Python
makes of their source.
"""

from __future__ import annotations

import ast
import builtins
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, Protocol

import torch

from jupyter_llmcloud.training.checkpoint import rng
from jupyter_llmcloud.training.resume.user_code import is_own_module

LOOP_FUNCTION = "__llmcloud_loop__"
WHILE_FUNCTION = "__llmcloud_while__"
_NUMBER = "llmcloud_number"
_FAST_S = 0.01

Number = int | str  # of a loop: its place in the cell; in other code with the name of that


class NumberLoops(ast.NodeTransformer):
    """Numbers the loops of a cell, so that each has one name however the cell is compiled."""

    def visit(self, node: ast.AST) -> ast.AST:
        for number, loop in enumerate(_loops_in(node)):
            setattr(loop, _NUMBER, number)
        return node


def _loops_in(tree: ast.AST) -> list[ast.For | ast.While]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While)]  # which does not recurse


@contextmanager
def _wrapped(tree: ast.AST) -> Iterator[None]:
    """Within the block every loop of a tree is tracked.

    `for x in y` is `for x in __llmcloud_loop__(y, number)`. Before `while y` there is
    `__llmcloud_while_N = __llmcloud_while__(number, first line, last line)`, and it is
    `while (__llmcloud_while_N is None or __llmcloud_while_N.turn()) and y`.
    """
    undo = ExitStack()
    with undo:
        for node in list(ast.walk(tree)):
            if isinstance(node, ast.For) and hasattr(node, _NUMBER):
                _set(undo, node, "iter", _call(node.iter, LOOP_FUNCTION, node.iter, getattr(node, _NUMBER)))
            for block in ("body", "orelse", "finalbody"):
                statements = getattr(node, block, None)
                if isinstance(statements, list) and any(map(_is_numbered_while, statements)):
                    _set(undo, node, block, [part for one in statements for part in _tracked_while(undo, one)])
        yield


def _is_numbered_while(node: ast.AST) -> bool:
    return isinstance(node, ast.While) and hasattr(node, _NUMBER)


def _tracked_while(undo: ExitStack, node: ast.stmt) -> list[ast.stmt]:
    if not isinstance(node, ast.While) or not hasattr(node, _NUMBER):
        return [node]
    number, at = getattr(node, _NUMBER), node.test
    name = f"__llmcloud_while_{number}"
    begin = ast.Assign([ast.Name(name, ast.Store())], _call(at, WHILE_FUNCTION, number, node.lineno, node.end_lineno))
    none = ast.Compare(ast.Name(name, ast.Load()), [ast.Is()], [ast.Constant(None)])
    turn = ast.Call(ast.Attribute(ast.Name(name, ast.Load()), "turn", ast.Load()), [], [])
    _set(undo, node, "test", _placed(ast.BoolOp(ast.And(), [ast.BoolOp(ast.Or(), [none, turn]), at]), at))
    return [_placed(begin, at), node]


def _call(at: ast.AST, function: str, *arguments: Any) -> Any:
    nodes: list[Any] = [one if isinstance(one, ast.AST) else ast.Constant(one) for one in arguments]
    return _placed(ast.Call(ast.Name(function, ast.Load()), nodes, []), at)


def _placed(node: Any, at: ast.AST) -> Any:
    """A node, and those in it that have no place yet, where another one is in the source."""
    for part in ast.walk(node):
        if "lineno" in part._attributes and not hasattr(part, "lineno"):
            ast.copy_location(part, at)
    return node


def _set(undo: ExitStack, node: ast.AST, name: str, value: Any) -> None:
    undo.callback(setattr, node, name, getattr(node, name))
    setattr(node, name, value)


@dataclass(frozen=True)
class _Compiled:
    """Code of a cell, and how to compile it once more."""

    plain: CodeType
    tree: ast.AST
    compile: Callable[[ast.AST], CodeType]


class InstrumentedCode:
    """The code of the user, as it is written and with its loops tracked.

    Functions have the latter only between `begin` and `end`: those of earlier cells and of modules get it then, and all
    get their own back. So nothing that leaves the rank, or that is compiled, traced or read by others, holds our calls.
    """

    def __init__(self) -> None:
        self.is_active = False
        self._pending: list[_Compiled] = []  # with functions; compiled with tracked loops when they are first needed
        self._tracked: dict[tuple[str, CodeType], CodeType] = {}
        self._plain: dict[tuple[str, CodeType], CodeType] = {}
        self._modules: dict[str, bytes] = {}  # sources that are compiled already

    def of_cell(self, plain: CodeType, tree: ast.AST, compile: Callable[[ast.AST], CodeType]) -> CodeType:
        """The code to execute for a part of a cell, which was compiled to `plain`."""
        if not _loops_in(tree):
            return plain
        compiled = _Compiled(plain, tree, compile)
        if self.is_active:
            return self._track(compiled)
        if _inner(plain):
            self._pending.append(compiled)
        return plain

    def of_module(self, path: str, source: bytes) -> CodeType:
        """The code of an own module with its loops tracked. Raises SyntaxError."""

        def make(tree: ast.AST) -> CodeType:
            code: CodeType = compile(tree, path, "exec", dont_inherit=True)  # type: ignore[call-overload]
            return code

        tree = NumberLoops().visit(ast.parse(source, path))
        self._modules[path] = source
        return self._track(_Compiled(make(tree), tree, make))

    def begin(self) -> None:
        """Every function of the user gets the code with tracked loops."""
        self.is_active = True
        pending, self._pending = self._pending, []
        for compiled in pending:
            self._track(compiled)
        for name, module in list(sys.modules.items()):
            if name != "__main__" and is_own_module(name):
                self._of_imported(str(module.__file__))
        _exchange(self._tracked)

    def end(self) -> None:
        """Every function of the user gets its own code back."""
        self.is_active = False
        _exchange(self._plain)

    def as_written(self, code: CodeType) -> CodeType:
        """The code without tracked loops."""
        return self._plain.get((code.co_filename, code), code)

    def _of_imported(self, path: str) -> None:
        try:
            source = Path(path).read_bytes()
            if self._modules.get(path) != source:
                self.of_module(path, source)  # only functions that are as in the file are found by it
        except (SyntaxError, ValueError, OSError):
            return

    def _track(self, compiled: _Compiled) -> CodeType:
        with _wrapped(compiled.tree):
            tracked = compiled.compile(compiled.tree)
        self._pair(compiled.plain, tracked)
        return tracked

    def _pair(self, plain: CodeType, tracked: CodeType) -> None:
        if plain == tracked:
            return
        self._tracked[plain.co_filename, plain] = tracked
        self._plain[tracked.co_filename, tracked] = plain
        inner, others = _inner(plain), _inner(tracked)
        if [one.co_name for one in inner] == [other.co_name for other in others]:
            for one, other in zip(inner, others, strict=True):
                self._pair(one, other)


def _inner(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _exchange(codes: dict[tuple[str, CodeType], CodeType]) -> None:
    """Give each function of this process that has one of these codes the other one."""
    files = {filename for filename, _ in codes}
    for item in gc.get_objects():
        if type(item) is FunctionType and (code := item.__code__).co_filename in files:
            other = codes.get((code.co_filename, code))
            if other is not None:
                item.__code__ = other


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
