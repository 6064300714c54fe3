"""The Python twin of every magic, under the same names: what `import jupyter_llmcloud as lc` offers."""

from __future__ import annotations

from typing import Any

from jupyter_llmcloud import errors
from jupyter_llmcloud.core.compression.spec import CompressSpec, ExportSpec
from jupyter_llmcloud.core.explain.spec import ExplainSpec
from jupyter_llmcloud.core.names import type_in_words
from jupyter_llmcloud.core.search.spec import SweepSpec
from jupyter_llmcloud.core.spec import EndpointSpec, RunSpec
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics import data
from jupyter_llmcloud.magics.commands import clusters as cluster
from jupyter_llmcloud.magics.commands import endpoints, runs
from jupyter_llmcloud.magics.commands import worlds as world
from jupyter_llmcloud.magics.commands.endpoints import Endpoint, serve
from jupyter_llmcloud.magics.compression.compress import compress, export
from jupyter_llmcloud.magics.output import shown_paths
from jupyter_llmcloud.magics.output.panels import ClusterPanel, EndpointPanel, WorldPanel
from jupyter_llmcloud.magics.search import commands as sweeps
from jupyter_llmcloud.magics.search.sweeps import SweepHandle, start
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import Cell, current_number
from jupyter_llmcloud.magics.session.null_run import run
from jupyter_llmcloud.magics.twin import describe
from jupyter_llmcloud.magics.understand.explain import explain
from jupyter_llmcloud.protocol.run_request import without_leading_blank_lines

__all__ = [
    "ClusterPanel",
    "Endpoint",
    "EndpointPanel",
    "WorldPanel",
    "cluster",
    "compress",
    "data",
    "distribute",
    "endpoints",
    "errors",
    "explain",
    "export",
    "pull",
    "push",
    "run",
    "runs",
    "serve",
    "sweep",
    "sweeps",
    "world",
]


shown_paths.install()


def distribute(code: str, *, n: int | None = None, **options: Any) -> Any:
    """Run `code` on every rank, as `%%distribute` does; returns a RunResult, or a RunHandle with background=True."""
    shell = _shell()
    return session.current().distribute(shell, _cell(shell, code, "distribute"), {"nproc": n, **options})


def sweep(code: str, *, n: int | None = None, **options: Any) -> SweepHandle:
    """Run `code` with `trial.suggest_...` as many trials, as `%%sweep` does; returns a handle of the sweep."""
    shell = _shell()
    return start(shell, _cell(shell, code, "sweep"), {"nproc": n, **options})


def _cell(shell: Any, code: str, twin: str = "distribute") -> Cell:
    if not isinstance(code, str):
        name = getattr(code, "__name__", "train")
        hint = (
            f" To call a function on the ranks: lc.{twin}({name + '()'!r}, push=[{name!r}])" if callable(code) else ""
        )
        raise UsageError(f"expected the text of a cell, not {type_in_words(code)}.{hint}")
    number = current_number(shell)
    body = without_leading_blank_lines(code)
    above = code[: len(code) - len(body)].count("\n")
    return Cell(body, code, above, shell.compile.get_code_name(code, code, number), number)


describe(distribute, RunSpec)
describe(sweep, SweepSpec)
describe(serve, EndpointSpec)
describe(compress, CompressSpec)
describe(export, ExportSpec)
describe(explain, ExplainSpec)


def push(*unnamed: Any, **values: Any) -> None:
    """Copy variables to every rank: `lc.push(a=1)`."""
    from jupyter_llmcloud.magics.commands.distribute import push as push_names

    if unnamed:
        name = unnamed[0] if isinstance(unnamed[0], str) and unnamed[0].isidentifier() else "x"
        raise UsageError(f"expected values by name, as in lc.push({name}={name}), not {unnamed[0]!r:.80}.")
    push_names([*values], values)


def pull(*names: str) -> Any:
    """Bring variables back: `lc.pull("x")`, `lc.pull("x@3", "y@all")`; one value, or a dict when several are named."""
    from jupyter_llmcloud.magics.commands.distribute import pull as pull_names

    if wrong := [name for name in names if not isinstance(name, str)]:
        raise UsageError(f"expected names of variables, as in lc.pull('x'), not {wrong[0]!r:.80}.")
    values = pull_names([*names])
    return next(iter(values.values())) if len(names) == 1 else values


def _shell() -> Any:
    from IPython.core.getipython import get_ipython
    from IPython.core.interactiveshell import InteractiveShell

    return get_ipython() or InteractiveShell.instance()
