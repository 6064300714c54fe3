"""A cell's uses of this package, replaced by what a plain script has, or refused by name."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Collection, Iterable

from jupyter_llmcloud.core.export.cells import SourceCell
from jupyter_llmcloud.core.export.names_used import names_used
from jupyter_llmcloud.errors import UsageError

PACKAGE = "jupyter_llmcloud"
RUN_NAMES = frozenset(
    {"id", "name", "rank", "world_size", "is_on_all_ranks", "folder", "should_stop", "resumed_step"}
    | {"log", "progress", "steps", "checkpoint"}
)


def plain_code(cell: SourceCell, before: Iterable[SourceCell] = ()) -> tuple[str, list[str]]:
    """The code without this package, and its `from __future__ import` lines, which a script begins with.

    `before`: cells that go along with it. Raises UsageError that names what has no counterpart, with its line.
    """
    tree = cell.tree
    bound, aliases = names_used(tree).bound, set[str]()
    for other in before:
        bound, aliases = bound | names_used(other.tree).bound, aliases | _our_names(other.tree)
    edits, futures = list[tuple[ast.AST, str]](), list[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names) if any(_is_ours(alias.name) for alias in names):
                if any("." in alias.name for alias in names if _is_ours(alias.name)):
                    raise _refused(cell, node, f"import {names[0].name}")
                aliases.update(alias.asname or alias.name for alias in names if _is_ours(alias.name))
                others = [alias for alias in names if not _is_ours(alias.name)]
                edits.append((node, ast.unparse(ast.Import(others)) if others else "pass"))
            case ast.ImportFrom(module=module, names=names) if _is_ours(module or ""):
                if module != PACKAGE or any(alias.name != "run" for alias in names):
                    wanted = next((alias.name for alias in names if alias.name != "run"), names[0].name)
                    raise _refused(cell, node, f"{module}.{wanted}")
                renamed = [f"{alias.asname} = run" for alias in names if alias.asname]
                edits.append((node, "; ".join(renamed) or "pass"))
            case ast.ImportFrom(module="__future__"):
                futures.append(ast.unparse(node))
                edits.append((node, "pass"))
    inside = set[int]()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name) as base, attr=attribute) if name in aliases:
                if attribute != "run":
                    raise _refused(cell, node, f"{name}.{attribute}")
                inside.add(id(base))
                edits.append((node, "run"))
            case ast.Attribute(value=ast.Name(id="run"), attr=attribute) if (
                "run" not in bound and attribute not in RUN_NAMES
            ):
                raise _refused(cell, node, f"run.{attribute}")
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()) if name in aliases and id(node) not in inside:
                raise _refused(cell, node, name)
            case ast.Name(id="get_ipython"):
                raise _refused(cell, node, "get_ipython")
    code = _edited(cell.code, edits)
    try:
        compile(code, "<cell>", "exec", dont_inherit=True)
    except SyntaxError as error:
        raise UsageError(
            f"run {cell.run_id} cannot be exported: {error.msg} (line {error.lineno}). A notebook takes that, a script "
            "does not: use asyncio.run() for what is awaited."
        ) from None
    return code, futures


def with_names_of_python(text: str, bound: Collection[str] | None) -> str:
    """A piece of a script that finds `print` and the like also where cells bind these names; None: nobody knows which.

    What it imports begins with an underscore, and nothing changes where no cell does so.
    """
    own = vars(builtins)
    names = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in own
    ]
    edits: list[tuple[ast.AST, str]] = [
        (node, f"_python.{node.id}") for node in names if bound is None or node.id in bound
    ]
    return "import builtins as _python\n" + _edited(text, edits) if edits else text


def _our_names(tree: ast.Module) -> set[str]:
    """By which names this package is known after a cell."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    return {alias.asname or alias.name for node in imports for alias in node.names if _is_ours(alias.name)}


def without_futures(cell: SourceCell) -> tuple[str, list[str]]:
    """The code as it is, and its `from __future__ import` lines, which are taken out of it."""
    found = [node for node in cell.tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    return _edited(cell.code, [(node, "pass") for node in found]), [ast.unparse(node) for node in found]


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _refused(cell: SourceCell, node: ast.AST, what: str) -> UsageError:
    line = getattr(node, "lineno", 0)
    return UsageError(
        f"run {cell.run_id} cannot be exported: {what} (line {line}) is there on ranks of a world only. Replace it in "
        "the cell by what a plain script has, and run it again."
    )


def _edited(code: str, edits: list[tuple[ast.AST, str]]) -> str:
    # Columns of the syntax tree count bytes; and in a text more ends a line for splitlines() than for Python.
    lines = code.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    text = b"".join(lines)
    placed = sorted(
        ((starts[n.lineno - 1] + n.col_offset, starts[n.end_lineno - 1] + n.end_col_offset, new) for n, new in edits),  # type: ignore[attr-defined]
        reverse=True,
    )
    for start, end, new in placed:
        text = text[:start] + new.encode() + text[end:]
    return text.decode()
