"""The source of a cell, executed as a notebook would: its functions, and errors in the cell's own lines."""

from __future__ import annotations

import asyncio
import inspect
import linecache
import sys
import traceback
import types
from typing import Any

from jupyter_llmcloud.core.serving.cell_source import CellSource
from jupyter_llmcloud.errors import ModelError

_PREFIX = "<llmcloud cell> "


def execute(source: CellSource) -> tuple[dict[str, Any], str]:
    """The namespace of a cell that was executed as `__main__`, and the name that its code has. Raises ModelError.

    It is the module `__main__`: what was pickled in a notebook is found again by its name there.
    """
    name = f"{_PREFIX}{source.name}"
    text = "\n" * (source.first_line - 1) + source.text
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(text, name, "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        raise ModelError(described(error)) from error
    return module.__dict__, name


def load(source: CellSource) -> Any:
    """Execute a cell and call its `load()`: its Functions, and the event loop that they share. Raises ModelError."""
    from jupyter_llmcloud.inference.open_inference.python_model import Functions, PythonModel

    namespace, _ = execute(source)
    runner = asyncio.Runner()
    try:
        loaded = namespace["load"]()
        if inspect.isawaitable(loaded):
            loaded = runner.run(_awaited(loaded))
    except Exception as error:
        raise ModelError(described(error)) from error
    max_rows = namespace.get("max_batch", 0)
    if not isinstance(max_rows, int) or isinstance(max_rows, bool) or max_rows < 0:
        raise ModelError(f"max_batch of the cell is a whole number of 0 or more, not {max_rows!r:.40}")
    stream = namespace.get("stream")
    functions = Functions(
        with_model(namespace["predict"], loaded),
        with_model(stream, loaded) if callable(stream) else None,
        max_rows,
        source.name,
    )
    return PythonModel(functions, runner)


async def _awaited(value: Any) -> Any:
    return await value


def with_model(function: Any, loaded: Any) -> Any:
    """The function of the inputs alone: one of two parameters gets as its second what `load()` returned."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = [item for item in inspect.signature(function).parameters.values() if item.kind in kinds]
    except (TypeError, ValueError):
        return function
    required = [item for item in parameters if item.default is item.empty]
    if len(required) < 2:
        return function
    return lambda inputs: function(inputs, loaded)


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
