"""The Python twin of every magic, under the same names: what `import jupyter_llmcloud as lc` offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jupyter_llmcloud import errors
from jupyter_llmcloud.magics.commands import clusters as cluster
from jupyter_llmcloud.magics.commands import endpoints, runs
from jupyter_llmcloud.magics.commands import worlds as world
from jupyter_llmcloud.magics.commands.endpoints import Endpoint, serve
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import Cell, current_number, without_leading_blank_lines
from jupyter_llmcloud.magics.session.null_run import run

__all__ = [
    "Endpoint",
    "cluster",
    "distribute",
    "endpoints",
    "errors",
    "pull",
    "push",
    "run",
    "runs",
    "serve",
    "world",
]


def distribute(
    code: str, *, n: int | None = None, push: Sequence[str] = (), pull: Sequence[str] = (), **options: Any
) -> Any:
    """Run `code` on every rank, as `%%distribute` does; returns a RunResult, or a RunHandle with background=True.

    `options` are those of the magic, with underscores: name, ranks, precision, save, timeout, seed, background,
    checkpoint_every, keep_checkpoints, max_restarts, resume.
    """
    shell = _shell()
    number = current_number(shell)
    body = without_leading_blank_lines(code)
    above = code[: len(code) - len(body)].count("\n")
    cell = Cell(body, code, above, shell.compile.get_code_name(code, code, number), number)
    return session.current().distribute(shell, cell, nproc=n, push=push, pull=pull, **options)


def push(**values: Any) -> None:
    """Copy variables to every rank: `lc.push(a=1)`."""
    from jupyter_llmcloud.magics.commands.distribute import push as push_names

    push_names([*values], values)


def pull(*names: str) -> Any:
    """Bring variables back: `lc.pull("x")`, `lc.pull("x@3", "y@all")`; one value, or a dict when several are named."""
    from jupyter_llmcloud.magics.commands.distribute import pull as pull_names

    values = pull_names([*names])
    return next(iter(values.values())) if len(names) == 1 else values


def _shell() -> Any:
    from IPython.core.getipython import get_ipython
    from IPython.core.interactiveshell import InteractiveShell

    return get_ipython() or InteractiveShell.instance()
