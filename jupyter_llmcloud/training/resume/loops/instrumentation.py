"""The loops of a cell in its code: each is numbered, and tracked while a cell runs that may be resumed.

In a cell that is tracked, the `for` loops of cells, and of the user's own modules, have their iterable in a
`TrackedLoop`, and a `while` loop asks a `TrackedWhile` before each iteration. In every other cell, and in whatever
leaves the rank, functions have the code that Python makes of their source.
"""

from __future__ import annotations

import ast
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from jupyter_llmcloud.training.resume.user_code import is_own_module

LOOP_FUNCTION = "__llmcloud_loop__"
WHILE_FUNCTION = "__llmcloud_while__"
_NUMBER = "llmcloud_number"
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")  # fields of a statement that hold others


class NumberLoops(ast.NodeTransformer):
    """Numbers the loops of a cell, so that each has one name however the cell is compiled."""

    def visit(self, node: ast.AST) -> ast.AST:
        for number, loop in enumerate(_loops_in(node)):
            setattr(loop, _NUMBER, number)
        return node


def _loops_in(tree: ast.AST) -> list[ast.For | ast.While]:
    """Those of a tree, also in functions and classes of it. Expressions, which hold none, are not looked into."""
    found: list[ast.For | ast.While] = []
    within = [tree]
    for node in within:  # which grows on the way, so that deep code needs no deep stack
        if isinstance(node, ast.For | ast.While):
            found.append(node)
        for block in _BLOCKS:
            if isinstance(nodes := getattr(node, block, None), list):
                within += nodes
    return found


@contextmanager
def _wrapped(tree: ast.AST) -> Iterator[None]:
    """Within the block every loop of a tree is tracked.

    `for x in y` is `for x in __llmcloud_loop__(y, number)`. Before `while y` there is
    `__llmcloud_while_N = __llmcloud_while__(number, first line, last line)`, and it is
    `while (__llmcloud_while_N is None or __llmcloud_while_N.iterate()) and y`.
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
    iterate = ast.Call(ast.Attribute(ast.Name(name, ast.Load()), "iterate", ast.Load()), [], [])
    _set(undo, node, "test", _located(ast.BoolOp(ast.And(), [ast.BoolOp(ast.Or(), [none, iterate]), at]), at))
    return [_located(begin, at), node]


def _call(at: ast.AST, function: str, *arguments: Any) -> Any:
    nodes: list[Any] = [one if isinstance(one, ast.AST) else ast.Constant(one) for one in arguments]
    return _located(ast.Call(ast.Name(function, ast.Load()), nodes, []), at)


def _located(node: Any, at: ast.AST) -> Any:
    """A node, and those in it that have no line yet, on the lines of another one."""
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
