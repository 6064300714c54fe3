"""A cell, and a script, finds what `python FILE ARGUMENTS` gives to a program; and it may leave as one."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from IPython.core.autocall import ExitAutocall

from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.resume.user_code import is_own_frame


def prepare_script(cell: Execute, namespace: dict[str, Any]) -> None:
    """Set `__file__` and `sys.argv`, and for a script the front of `sys.path`.

    The file of a cell is `cell.py` in the folder of its run, so that what a script keeps beside itself is kept there.
    """
    file = cell.script["file"] if cell.script else os.path.join(cell.folder, "cell.py")
    sys.argv = [file or "-", *(cell.script["arguments"] if cell.script else cell.arguments)]
    namespace.pop("__file__", None)
    if file:
        namespace["__file__"] = file
    if cell.script and file:
        _put_first(os.path.dirname(file), cell.script["folder"])


def _put_first(folder: str, run_in: str) -> None:
    if sys.path[0] in (os.getcwd(), run_in):
        del sys.path[0]  # a notebook finds what lies beside it, a script what lies beside its file
    if sys.path[0] != folder:
        sys.path.insert(0, folder)


def ended_well(error: BaseException | None) -> bool:
    """Whether code that raised `error` has left as it wanted to: by sys.exit(), or with the status 0."""
    return isinstance(error, SystemExit) and (error.code is None or (isinstance(error.code, int) and error.code == 0))


def was_stopped(error: BaseException | None) -> bool:
    """Whether an interrupt ended it, also where a library has taken the interrupt and left by an error of its own.

    So do Lightning, by SystemExit, and the `map` of data sets, which asks workers that are not done for their results.
    What the user's own code raises over an interrupt is an error.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        before = error.__cause__ or error.__context__
        if not isinstance(error, SystemExit) and not _was_caught_in_a_library(before):
            return False
        error = before
    return False


def _was_caught_in_a_library(error: BaseException | None) -> bool:
    """Whether the code that met this error, in an `except` or `finally`, is not the user's."""
    met = error.__traceback__ if error is not None else None
    return met is not None and not is_own_frame(met.tb_frame)


class ExitCommand(ExitAutocall):
    """`exit` and `quit`, in a cell and in libraries: Python's own, but that standard input stays open."""

    def __call__(self, code: Any = None) -> NoReturn:
        raise SystemExit(code)
