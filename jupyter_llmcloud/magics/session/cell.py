"""A notebook cell before it leaves for the ranks: its name, its lines, its syntax, the names it binds."""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from jupyter_llmcloud.core.plain_cells import read_plain
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.run_request import without_leading_blank_lines

_NAMESPACES = ("globals", "locals", "vars", "dir")
_TOGETHER = {
    *("prepare", "prepare_model", "wait_for_everyone", "gather", "gather_for_metrics", "reduce", "main_process_first"),
    *("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "all_to_all", "barrier", "broadcast"),
    *("broadcast_object_list", "reduce_scatter", "scatter", "send", "recv", "new_group", "init_process_group"),
    *("DistributedDataParallel", "DDP", "FullyShardedDataParallel", "FSDP", "fully_shard", "init_device_mesh"),
    *("train", "fit", "evaluate", "predict", "backward", "save_state", "load_state", "notebook_launcher"),
}
_DEFINES = re.compile(r"\b(?:import|def|class)\b")
_UNKNOWN_NAME = re.compile(r"name '(\w+)' is not defined(?:\..*)?", re.DOTALL)
_DYNAMIC = ("run_line_magic", "run_cell_magic", "exec", "eval", "globals", "locals")


class CellSyntaxError(UsageError):
    """The cell cannot be compiled; drawn like Python's own, at the notebook's line."""

    def __init__(self, error: SyntaxError, where: str, line: int) -> None:
        self.lineno = line
        text = textwrap.dedent(error.text or "").rstrip("\n")
        shift = len((error.text or "").rstrip("\n")) - len(text)
        caret = " " * max(0, (error.offset or 1) - 1 - shift) + "^"
        self.drawing = [f"  {where}, line {line}", f"    {text}", f"    {caret}", f"SyntaxError: {error.msg}"]
        super().__init__(f"SyntaxError: {error.msg} ({where}, line {line}). Nothing was started.")

    def _render_traceback_(self) -> list[str]:
        return [*self.drawing, "", "Nothing was started."]


@dataclass(frozen=True)
class Cell:
    """The body of a `%%distribute` cell and where it stands in the notebook.

    Attributes:
        code: the body as typed.
        source: the whole cell.
        line_offset: lines of the cell above the body.
        filename: the notebook's own name of the cell, so that tracebacks agree.
        number: the execution count.
    """

    code: str
    source: str
    line_offset: int
    filename: str
    number: int


def read_cell(shell: Any, magic_line: str, body: str, magic: str = "%%distribute") -> Cell:
    """The cell that is being executed in `shell` (an IPython shell)."""
    source = _raw_source(shell)
    if not body.strip() or not source.rstrip().endswith(body.rstrip()):
        source = f"{magic} {magic_line}".rstrip() + "\n" + body
    code = without_leading_blank_lines(body)
    offset = source.rstrip()[: len(source.rstrip()) - len(code.rstrip())].count("\n")
    number = current_number(shell)
    return Cell(code, source, offset, shell.compile.get_code_name(source, source, number), number)


def current_number(shell: Any) -> int:
    """The n of the In [n] that is being executed: newer shells count on before they execute, older ones afterwards."""
    stored = getattr(shell.history_manager, "input_hist_raw", None) or [""]
    return min(shell.execution_count, len(stored) - 1) or shell.execution_count


def _raw_source(shell: Any) -> str:
    parent = getattr(shell, "parent_header", None) or {}
    if code := parent.get("content", {}).get("code"):
        return str(code)
    history = getattr(shell.history_manager, "input_hist_raw", None) or [""]
    return str(history[-1])


def check_syntax(shell: Any, cell: Cell) -> ast.Module | None:
    """Compile the cell as the ranks will; raises CellSyntaxError. Returns its tree."""
    try:
        transformed, tree = cell.code, read_plain(cell.code)
        if tree is None or _may_be_magic(tree):
            transformed = shell.transform_cell(cell.code)
            tree = ast.parse(transformed)
        compile(transformed, cell.filename, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except SyntaxError as error:
        lines = cell.code.split("\n")
        line = error.lineno or 1
        if error.text is None and line <= len(lines):  # of what only the compiler refuses
            error.text = lines[line - 1]
        raise CellSyntaxError(error, f"Cell In[{cell.number}]", line + cell.line_offset) from None
    return tree


def _may_be_magic(tree: ast.Module) -> bool:
    """Whether it is one line that may be a magic without its sign, such as `pwd`."""
    body = tree.body
    return not body or (body[-1].end_lineno == 1 and isinstance(body[0], ast.Expr | ast.AugAssign))


def is_definition(tree: ast.Module) -> bool:
    """Whether the cell only imports, defines and names constants, so that it can be run again at any time.

    So can what it makes only where it is not there yet: `if "model" not in globals(): model = make()`, unless the ranks
    must make that together.
    """
    return all(_is_definition(node) for node in tree.body)


def definitions_of(code: str) -> str:
    """The imports, functions and classes of a cell that does more than that, each in its line; "" for none.

    Only those that need nothing when they are defined but what stands among them, and whose name the cell binds once:
    a new rank has what the others have.
    """
    if not _DEFINES.search(code):  # most short cells
        return ""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a magic
        return ""
    bound = Counter(_bound_by(node) for node in _top_level(tree))
    known, lines = set(dir(builtins)), Counter(line for node in tree.body for line in _lines(node))
    kept: set[int] = set()
    for node in tree.body:
        names, is_import = _defined(node), isinstance(node, ast.Import | ast.ImportFrom)
        alone = all(lines[line] == 1 for line in _lines(node))
        once = all(bound[name] == (not is_import) for name in names)
        if names and alone and once and _needed_at_once(node) <= known:
            known |= names
            kept.update(_lines(node))
    return "\n".join(line if number in kept else "" for number, line in enumerate(code.split("\n"), 1)).rstrip()


def _lines(node: ast.stmt) -> range:
    first = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", ()))])
    return range(first, (node.end_lineno or node.lineno) + 1)


def _defined(node: ast.stmt) -> set[str]:
    match node:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {(alias.asname or alias.name).split(".")[0] for alias in names} - {"*"}
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
    return set()


def _bound_by(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
    return ""


def _needed_at_once(node: ast.AST) -> set[str]:
    """Names that are looked up when a function or a class is defined, not when it is called."""
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Load) else set()
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        children = [*node.decorator_list, node.args, *([node.returns] if node.returns else [])]
    elif isinstance(node, ast.Lambda):
        children = [node.args]
    return {name for child in children for name in _needed_at_once(child)}


def guarded_names(tree: ast.Module) -> set[str]:
    """Variables of which the cell asks whether they are there: ranks that differ in them go different ways."""
    return {name for node in tree.body if (name := _guarded(node))}


def _guarded(node: ast.stmt) -> str:
    """`model` for `if "model" not in globals()`, and for `try: model` with `except NameError`; "" for others."""
    match node:
        case ast.If(test=ast.UnaryOp(op=ast.Not(), operand=test)) | ast.If(test=test):
            match test:
                case ast.Compare(
                    left=ast.Constant(value=str() as name),
                    ops=[ast.In() | ast.NotIn()],
                    comparators=[ast.Call(func=ast.Name(id=where), args=[])],
                ) if where in _NAMESPACES:
                    return name
        case ast.Try(body=[ast.Expr(value=ast.Name(id=name))], handlers=[ast.ExceptHandler(type=ast.Name(id=error))]):
            return name if error == "NameError" else ""
    return ""


def _is_made_alone(node: ast.AST) -> bool:
    """Whether nothing in it looks as if ranks had to do it together."""
    for part in ast.walk(node):
        match part:
            case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)) if name in _TOGETHER:
                return False
            case ast.Await():
                return False
    return True


def _is_definition(node: ast.stmt) -> bool:
    if _guarded(node):
        return _is_made_alone(node)
    match node:
        case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return True
        case ast.Assign(value=value) | ast.AnnAssign(value=value) | ast.Expr(value=value):
            moving = (ast.Call, ast.Name, ast.Await)
            return value is None or not any(isinstance(part, moving) for part in ast.walk(value))
    return isinstance(node, ast.Pass)


def bound_names(tree: ast.Module) -> set[str] | None:
    """Names that running the cell may bind at its top level; None when that cannot be told from the text."""
    names: set[str] = set()
    nodes = list(ast.walk(tree))
    looked_in = {
        where for node in nodes if isinstance(node, ast.Compare) for where in node.comparators
    }  # `in globals()`
    if any(_binds_anything(node) for node in nodes if node not in looked_in):
        return None
    for node in _top_level(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.MatchAs(name=str() as name) | ast.MatchStar(name=str() as name):
                names.add(name)
            case ast.MatchMapping(rest=str() as name):
                names.add(name)
            case ast.Global(names=declared):
                names.update(declared)
    return names


def name_of_notebook(ename: str, evalue: str, notebook: Mapping[str, Any]) -> list[str]:
    """What to say of an error over a name that the ranks do not know and the notebook does: each has its own."""
    found = _UNKNOWN_NAME.fullmatch(evalue) if ename == "NameError" else None
    if found is None or (name := found[1]) not in notebook:
        return []
    if isinstance(notebook[name], ModuleType):
        return [f"{name} was imported in this notebook, and not on the ranks: import it in the cell."]
    return [
        f"{name} is a variable of this notebook, and none of the ranks: --push {name} in the cell's first line, or "
        f"%push {name}, copies it to them."
    ]


def _binds_anything(node: ast.AST) -> bool:
    match node:
        case ast.ImportFrom(names=[ast.alias(name="*")]):
            return True
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name in _DYNAMIC
    return False


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below that runs in the cell's own scope, and what functions declare global."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from (part for part in ast.walk(child) if isinstance(part, ast.Global))
        else:
            yield from _top_level(child)
