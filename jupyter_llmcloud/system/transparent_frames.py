"""Frames that `warnings.warn(..., stacklevel=n)` does not count.

A function that stands in for a library's is one frame more between the library and the line that called it. Warnings
name the caller by counting frames: with ours among them they would name us, be shown once for all lines of the user,
and be dropped where only those of `__main__` are shown. Python leaves out the frames of its own import system, which it
knows by the names of their files; a file that is named in the same way is left out, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

_PACKAGE = str(Path(__file__).parents[1])
MARK = "/importlib._bootstrap/.."  # between the package and the path in it; lines are found by the loader
_MARKED = _PACKAGE + MARK


def make_transparent(names: Iterable[str]) -> None:
    """Mark every function of these modules, and of those below them, as far as they are loaded."""
    parts = tuple(names)
    for name, module in list(sys.modules.items()):
        if any(name == part or name.startswith(f"{part}.") for part in parts) and isinstance(module, ModuleType):
            for function in _functions(module):
                function.__code__ = _marked(function.__code__)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    pending: list[Any] = list(vars(module).values())
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if id(item) in seen or getattr(item, "__module__", module.__name__) != module.__name__:
            continue
        seen.add(id(item))
        if isinstance(item, type):
            pending += vars(item).values()
        elif isinstance(item, property):
            pending += (item.fget, item.fset)
        else:
            pending += (getattr(item, "__func__", None), getattr(item, "__wrapped__", None))
        if isinstance(item, FunctionType):
            yield item


def _marked(code: CodeType) -> CodeType:
    """The same code under a name that is not counted, and what is defined in it."""
    if not code.co_filename.startswith(_PACKAGE) or code.co_filename.startswith(_MARKED):
        return code
    inner = tuple(_marked(item) if isinstance(item, CodeType) else item for item in code.co_consts)
    return code.replace(co_filename=_MARKED + code.co_filename.removeprefix(_PACKAGE), co_consts=inner)
