"""One row of the table: what was measured, beside what, and what it should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Row:
    """Ours beside one peer.

    Attributes:
        axis: of the command line.
        what: one line for a reader.
        unit: of the samples.
        peer: who it is compared with.
        ours, theirs: the samples, of interleaved rounds.
        goal: the ratio ours / theirs to reach; None when this row only informs.
        at_least: whether more is better.
    """

    axis: str
    what: str
    unit: str
    peer: str
    ours: Sequence[float]
    theirs: Sequence[float]
    goal: float | None = None
    at_least: bool = False

    @property
    def ratio(self) -> float:
        """Median of ours over median of theirs."""
        return median(self.ours) / median(self.theirs)

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.ratio >= self.goal if self.at_least else self.ratio <= self.goal

    def as_json(self) -> dict[str, Any]:
        """Everything, with the samples."""
        return {**asdict(self), "ratio": self.ratio, "reached": self.reached}


_HEADINGS = ("what", "unit", "ours", "peer", "theirs", "ratio", "goal", "")
_VERDICTS = {True: "reached", False: "MISSED", None: ""}


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([drawn[0], "-" * len(drawn[0]), *drawn[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    goal = "" if row.goal is None else f"{'>=' if row.at_least else '<='} {row.goal:g}"
    ours, theirs = (f"{median(samples):.4g}" for samples in (row.ours, row.theirs))
    return row.what, row.unit, ours, row.peer, theirs, f"{row.ratio:.3f}", goal, _VERDICTS[row.reached]
