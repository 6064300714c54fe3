"""Runs beside each other: `%runs compare`, and a run once more: `%runs reproduce`."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.core.output.numerals import format_step
from jupyter_llmcloud.core.run.comparison import RunDifferences
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import Cell, current_number
from jupyter_llmcloud.storage.recorded import export
from jupyter_llmcloud.storage.recorded.comparison import compared, compared_again
from jupyter_llmcloud.storage.runs import RunStore

# Of the earlier run's options, those that say how it computes.
_KEPT = ("precision", "plan", "accelerate_config", "compress_gradients", "balance", "args", "hang_after", "watch")


class ComparisonReport:
    """Shown by IPython: a table of what differs, and the difference of the code.

    Attributes:
        comparison: the same as values.
    """

    def __init__(self, comparison: RunDifferences, verdict: str = "") -> None:
        self.comparison = comparison
        self.verdict = verdict
        rows: list[tuple[object, ...]] = [(name, *map(_shown, values), "") for name, values in comparison.facts]
        for name, last, step in comparison.metrics:
            apart = "the same" if step is None else f"apart from step {format_step(step)}"
            rows.append((f"{name} (last)", *map(_shown, last), apart))
        self.table = Table(["", *comparison.runs, ""], rows, "Nothing differs, and no metrics were logged.")

    @property
    def _code(self) -> str:
        return "\n".join(filter(None, self.comparison.code)) or "The code is the same."

    def __repr__(self) -> str:
        return "\n\n".join(filter(None, [self.verdict, repr(self.table), self._code]))

    def _repr_html_(self) -> str:
        verdict = f"<p>{html.escape(self.verdict)}</p>" if self.verdict else ""
        return f"{verdict}{self.table._repr_html_()}<pre>{html.escape(self._code)}</pre>"


def compare(*names: str, tolerance: float = 0.0) -> ComparisonReport:
    """Options, topology, versions, metrics and code of runs, as far as they differ from the first one's.

    Values of metrics within `tolerance` (relative) count as the same. Raises NotFound, and UsageError for fewer than
    two runs.
    """
    return ComparisonReport(compared(RunStore(), names, tolerance))


def reproduce(shell: Any, name: str) -> ComparisonReport:
    """Run it again on this notebook's ranks, as if they held no variables, and compare.

    Raises UsageError that names what it needs and cannot have again.
    """
    record, code, is_seeded = export.as_one_cell(RunStore(), name)
    given: dict[str, Any] = {option: record.spec[option] for option in _KEPT if option in record.spec}
    if not is_seeded and "seed" in record.spec:
        given["seed"] = record.spec["seed"]
    again = f"{record.name[:100]}-again"
    given |= {"nproc": record.world_size, "fresh": True, "name": again}
    number = current_number(shell)
    cell = Cell(code, code, 0, shell.compile.get_code_name(code, code, number), number)
    session.current().distribute(shell, cell, given)
    comparison = compared_again(RunStore(), record.run_id, again)
    return ComparisonReport(comparison, verdict(comparison))


def verdict(comparison: RunDifferences) -> str:
    """One sentence: the same values, or where they part."""
    if not comparison.metrics:
        return "Neither run logged metrics: there is nothing by which to tell whether they are the same."
    apart = {name: step for name, _, step in comparison.metrics if step is not None}
    if not apart:
        return f"Reproduced: every value of {', '.join(name for name, _, _ in comparison.metrics)} is the same."
    first = min(apart, key=lambda name: apart[name])
    return f"Not reproduced: {first} differs from step {format_step(apart[first])} on."


def as_dict(comparison: RunDifferences) -> Mapping[str, Any]:
    """For JSON."""
    return vars(comparison)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
