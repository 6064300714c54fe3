"""`inspect.getsource` of a class of a cell, which libraries ask for: torch.jit, transformers, data classes of theirs.

Python looks for a class in the file of its module. That of `__main__` is the cell that runs now; the class may be of
any cell before it.
"""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import Any

from jupyter_llmcloud.training import patches


def install(cells: Callable[[], Iterable[str]]) -> None:
    """For this process. `cells` gives the names that cells were compiled under, the newest last."""

    def replace(original: Any) -> Any:
        def getfile(object: Any) -> str:
            is_own = isinstance(object, type) and object.__module__ == "__main__"
            return (file_of(object, list(cells())) if is_own else None) or str(original(object))

        return getfile

    patches.CLASS_SOURCES.apply({"inspect:getfile": replace})


def file_of(cls: type, cells: list[str]) -> str | None:
    """The name of the cell, one of `cells`, that a class was defined in; None when none of them has it."""
    names = {code.co_filename for code in _codes(cls)}
    if own := [cell for cell in cells if cell in names]:
        return own[-1]
    statement = re.compile(rf"^\s*class\s+{re.escape(cls.__name__)}\b", re.MULTILINE)
    return next((cell for cell in reversed(cells) if statement.search("".join(linecache.getlines(cell)))), None)


def _codes(cls: type) -> Iterable[CodeType]:
    """Those of the functions in its body, not of functions that were set later or come from elsewhere."""
    for value in vars(cls).values():
        wrapped = getattr(value, "fget", None) or getattr(value, "__func__", value)
        function = inspect.unwrap(wrapped) if callable(wrapped) else None
        if isinstance(function, FunctionType) and function.__qualname__.startswith(f"{cls.__qualname__}."):
            yield function.__code__
