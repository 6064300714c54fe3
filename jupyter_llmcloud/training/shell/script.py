"""A script is executed as `python FILE ARGUMENTS` would, though by the shell of a rank; it, and a cell, may leave."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from IPython.core.autocall import ExitAutocall


def prepare_script(script: Mapping[str, Any], namespace: dict[str, Any]) -> None:
    """What Python gives to a script: `__file__`, `sys.argv`, and its own folder at the front of `sys.path`."""
    file = script["file"]
    sys.argv = [file or "-", *script["arguments"]]
    if not file:
        return
    namespace["__file__"] = file
    folder = os.path.dirname(file)
    if sys.path[0] in (os.getcwd(), script["folder"]):
        del sys.path[0]  # a notebook finds what lies beside it, a script what lies beside its file
    if sys.path[0] != folder:
        sys.path.insert(0, folder)


def ended_well(error: BaseException | None) -> bool:
    """Whether code that raised `error` has left as it wanted to: by sys.exit(), or with the status 0."""
    return isinstance(error, SystemExit) and (error.code is None or (isinstance(error.code, int) and error.code == 0))


def was_stopped(error: BaseException | None) -> bool:
    """Whether an interrupt ended it, also where a library has taken the interrupt and left, as Lightning does."""
    seen: set[int] = set()
    while isinstance(error, SystemExit) and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt)


class ExitCommand(ExitAutocall):
    """`exit` and `quit`, in a cell and in libraries: Python's own, but that standard input stays open."""

    def __call__(self, code: Any = None) -> NoReturn:
        raise SystemExit(code)
