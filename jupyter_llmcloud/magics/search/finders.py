"""`%lr_find`, `%batch_find`: a few steps on the ranks, a picture, and a suggestion with its evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.core.names import parse_variable_name
from jupyter_llmcloud.core.options import Option, Syntax, integer, number
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.search.pictures import rate_curve
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import Cell, current_number

FOUND = "_llmcloud_found"
WATCH = "loss-spike=off,gradient-spike=off,not-finite=off"  # rates grow until the loss leaves its range
LOSS = Option(
    ("--loss",),
    "Variable of the ranks: a function of (output, target), for batches of two parts. Left out: model(**batch).loss.",
    metavar="NAME",
    parse=parse_variable_name,
    names="variables of ranks",
)
LR_FIND = Syntax(
    "%lr_find",
    (
        LOSS,
        Option(("--low",), "The first rate (1e-7).", metavar="X", parse=number(1e-12)),
        Option(
            ("--high",), "The last one (10), if the loss has not diverged before.", metavar="X", parse=number(1e-12)
        ),
        Option(("--steps",), "How many steps (100).", metavar="N", parse=integer(20)),
    ),
    "MODEL OPTIMIZER LOADER",
    "A learning rate by a range test: steps on the ranks at growing rates; then everything is as it was.",
    names="variables of ranks",
)
BATCH_FIND = Syntax(
    "%batch_find",
    (
        LOSS,
        Option(("--first",), "The first size, of a rank (1).", metavar="N", parse=integer(1)),
        Option(("--most",), "The largest size, of a rank (the rows there are).", metavar="N", parse=integer(1)),
    ),
    "MODEL OPTIMIZER LOADER",
    "A batch size: twice as many rows each time, until memory is short or more is not faster.",
    names="variables of ranks",
)


class RateReport:
    """What a range test has found.

    Attributes:
        rate: the learning rate that is suggested; None when the losses tell none.
        lowest: at which the smoothed loss was lowest.
        reason: why, in words.
        rates, losses: what was measured.
    """

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.rates: list[float] = told["rates"]
        self.losses: list[float] = told["losses"]
        self.rate: float | None = told["rate"]
        self.lowest: float | None = told["lowest"]
        self.reason: str = told["reason"]

    def __repr__(self) -> str:
        found = f"learning rate {self.rate:.2g}" if self.rate is not None else "no learning rate"
        return f"{found}: {self.reason}."

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        drawn = rate_curve([*zip(self.rates, self.losses, strict=True)], self.rate)
        return {"text/plain": repr(self), "text/html": f"<div>{self!r}</div>{drawn}"}


class BatchReport:
    """What growing batches have shown.

    Attributes:
        size: the batch of a rank that is suggested; None when none fits.
        reason: why no larger one was tried.
        sizes: (rows, rows per second of all ranks, bytes of a rank, whether it fits).
    """

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.size: int | None = told["size"]
        self.reason: str = told["reason"]
        self.sizes: list[tuple[int, float, int, bool]] = [tuple(row) for row in told["sizes"]]

    def table(self) -> Table:
        """A row for each size."""
        rows = [
            (size, f"{speed:,.0f}" if fits else "did not fit", f"{memory / 2**20:,.0f} MiB")
            for size, speed, memory, fits in self.sizes
        ]
        return Table(["rows of a rank", "rows per second, all ranks", "memory of a rank"], rows, "")

    def __repr__(self) -> str:
        found = f"batch size {self.size} on each rank" if self.size is not None else "no batch size"
        return f"{found}: {self.reason}.\n{self.table()!r}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        head = repr(self).partition("\n")[0]
        return {"text/plain": repr(self), "text/html": f"<div>{head}</div>{self.table()._repr_html_()}"}


def lr_find(
    shell: Any,
    model: str,
    optimizer: str,
    loader: str,
    loss: str | None = None,
    low: float | None = None,
    high: float | None = None,
    steps: int | None = None,
) -> RateReport:
    """A learning rate for variables of the ranks, by their names; they are as before in the end."""
    low, high = low or 1e-7, high or 10.0
    if not low < high or not math.isfinite(high):
        raise UsageError(f"--low {low:g} --high {high:g}: the first rate must be below the last one.")
    call = f"low={low!r}, high={high!r}, num_steps={steps or 100}"
    return RateReport(_on_ranks(shell, "lr_find", [model, optimizer, loader], loss, call))


def batch_find(
    shell: Any,
    model: str,
    optimizer: str,
    loader: str,
    loss: str | None = None,
    first: int | None = None,
    most: int | None = None,
) -> BatchReport:
    """A batch size for variables of the ranks, by their names; they are as before in the end."""
    call = f"first={first or 1}, most={most or 0}"
    return BatchReport(_on_ranks(shell, "batch_find", [model, optimizer, loader], loss, call))


def _on_ranks(shell: Any, what: str, names: list[str], loss: str | None, call: str) -> dict[str, Any]:
    here = session.current()
    world = here.attach_world()
    if world is None:
        raise UsageError(f"%{what}: this notebook has no world yet: make the model in a %%distribute cell first.")
    named = [parse_variable_name(name) for name in (*names, *([loss] if loss else []))]
    for name in world.missing(named):
        raise UsageError(f"%{what}: the ranks have no variable {name!r}.")
    code = "\n".join(
        [
            "from jupyter_llmcloud.training.search import range_test as _llmcloud_range_test",
            f"{FOUND} = _llmcloud_range_test.{what}(run, {', '.join(names)}, {loss}, {call})",
        ]
    )
    number = current_number(shell)
    cell = Cell(code, code, 0, shell.compile.get_code_name(code, code, number), number)
    here.distribute(shell, cell, {"name": what.replace("_", "-"), "pull": [FOUND], "watch": WATCH})
    told: dict[str, Any] = shell.user_ns.pop(FOUND)
    return told
