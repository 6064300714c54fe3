"""The source of a cell, executed as a notebook would: its functions, and errors in the cell's own lines."""

from __future__ import annotations

import asyncio
import linecache
import sys
import traceback
import types
from typing import Any

from jupyter_llmcloud.core.serving.models.cell_source import CellSource
from jupyter_llmcloud.errors import ModelError

_PREFIX = "<llmcloud cell> "

# What code of a user's own may raise: `exit()` in it must not end the process that serves it, and a task of its own
# that was cancelled is none of ours.
RAISED = (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError)


def execute(source: CellSource) -> dict[str, Any]:
    """The namespace of a cell that was executed as `__main__`. Raises ModelError.

    It is the module `__main__`: what was pickled in a notebook is found again by its name there.
    """
    name = f"{_PREFIX}{source.name}"
    text = "\n" * (source.first_line - 1) + source.text
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(text, name, "exec", dont_inherit=True), module.__dict__)
    except RAISED as error:
        raise ModelError(described(error)) from error
    return module.__dict__


def described(error: BaseException) -> str:
    """An exception in the cell's own lines: `ValueError: no\\nCell In[4], line 3, in predict\\n    raise ...`.

    Frames of libraries below the last line of the cell are left out, as the text of the exception is theirs.
    """
    told = "".join(traceback.format_exception_only(error)).strip()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_PREFIX)]
    lines = [told]
    for frame in frames:
        where = "" if frame.name == "<module>" else f", in {frame.name}"
        lines.append(f"{frame.filename.removeprefix(_PREFIX)}, line {frame.lineno}{where}")
        if frame.line:
            lines.append(f"    {frame.line}")
    if isinstance(error, SyntaxError):
        lines[0] = lines[0].replace(_PREFIX, "")
    return "\n".join(lines)
