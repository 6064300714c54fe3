"""The source of a cell that is served: what it must define, checked before anything is started."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.errors import UsageError

NEEDED = ("load", "predict")
MAX_SOURCE = 1 << 19  # characters
# Names by which two parameters are known to stand in the wrong order.
_OF_MODELS = frozenset({"model", "loaded", "net", "network", "pipe", "pipeline", "estimator", "clf", "classifier"})
_OF_INPUTS = frozenset({"input", "inputs", "x", "batch", "data", "rows", "text", "texts", "features", "request"})


@dataclass(frozen=True)
class CellSource:
    """A cell with its place in the notebook.

    Attributes:
        text: as typed, without the line of the magic.
        name: how the notebook calls the cell: "Cell In[4]".
        first_line: of `text`, counted in the cell.
        folder: where the notebook is: relative paths and its own modules are looked for there.
    """

    text: str
    name: str = "the cell"
    first_line: int = 1
    folder: str = ""

    def as_record(self) -> dict[str, Any]:
        """Plain values."""
        return {"text": self.text, "name": self.name, "first_line": self.first_line, "folder": self.folder}


def check_source(source: CellSource) -> None:
    """Raise UsageError unless the cell is Python, and defines `load()` and `predict(inputs)`."""
    if len(source.text) > MAX_SOURCE:
        raise UsageError(f"%%serve: the cell has {len(source.text)} characters, at most {MAX_SOURCE} are served.")
    try:
        tree = ast.parse(source.text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UsageError(_syntax(source, error)) from None
    defined = _defined(tree)
    missing = [name for name in NEEDED if name not in defined]
    if missing:
        example = {"load": "def load(): ...", "predict": "def predict(inputs): ..."}
        said = " and ".join(f"{name}()" for name in missing)
        raise UsageError(
            f"%%serve: {source.name} defines no {said}. It needs {', '.join(example[name] for name in missing)} "
            "at the outermost level; stream(inputs) may be there, too."
        )
    for name, node in defined.items():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            _check_parameters(source, name, node)


def _defined(tree: ast.Module) -> dict[str, ast.AST]:
    """What the outermost statements bind, with how; also below if, try and with."""
    found: dict[str, ast.AST] = {}
    waiting: list[ast.AST] = list(reversed(tree.body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found[node.id] = node
        if not isinstance(node, ast.Lambda):
            waiting += list(ast.iter_child_nodes(node))
    return found


def _check_parameters(source: CellSource, name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    """`load` takes nothing, `predict` and `stream` the inputs, and what `load` returned when they have a second."""
    if name not in (*NEEDED, "stream"):
        return
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    required = len(positional) - len(given.defaults)
    only = [arg.arg for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
    if name == "load":
        fits, wanted = not required, "no arguments: load()"
    else:
        fits = required <= 2 and bool(positional or given.vararg)
        wanted = f"the inputs, and if it wants what load() returned: {name}(inputs) or {name}(inputs, model)"
    if not fits or only:
        line = node.lineno + source.first_line - 1
        raise UsageError(f"%%serve: {source.name}, line {line}: {name} is called with {wanted}.")
    names = [arg.arg for arg in positional]
    if name != "load" and required == 2 and names[0].lower() in _OF_MODELS and names[1].lower() in _OF_INPUTS:
        line = node.lineno + source.first_line - 1
        raise UsageError(
            f"%%serve: {source.name}, line {line}: {name} gets the inputs first, then what load() returned: write "
            f"{name}({names[1]}, {names[0]}), not {name}({names[0]}, {names[1]})."
        )


def _syntax(source: CellSource, error: Exception) -> str:
    if not isinstance(error, SyntaxError) or error.lineno is None:
        return f"%%serve: {source.name} is not Python: {error}."
    line = (error.text or "").strip()
    shown = f": {line}" if line else ""
    hint = " Magics and shell commands do not go along." if line.startswith(("%", "!")) else ""
    at = error.lineno + source.first_line - 1
    return f"%%serve: {source.name}, line {at}: SyntaxError: {error.msg}{shown}{hint}"
