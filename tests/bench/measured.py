"""One row of the table: what was measured, beside what, and what it should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

MAX_KEPT = 500


@dataclass(frozen=True)
class Row:
    """Ours beside one peer.

    Attributes:
        axis: of the command line.
        what: one line for a reader.
        unit: of the samples.
        peer: who it is compared with; "" when with nobody.
        ours, theirs: the samples, of interleaved rounds.
        goal: the ratio ours / theirs to reach; None when this row only informs.
        limit: what ours may be at most, or must be at least, whatever the peer does.
        at_least: whether more is better.
        percent: which percentile of the samples counts.
        missing: why the peer could not be measured.
    """

    axis: str
    what: str
    unit: str
    peer: str
    ours: Sequence[float]
    theirs: Sequence[float] = ()
    goal: float | None = None
    at_least: bool = False
    limit: float | None = None
    percent: int = 50
    missing: str = ""

    @property
    def our_value(self) -> float:
        """The one number for ours."""
        return percentile(self.ours, self.percent)

    @property
    def their_value(self) -> float | None:
        """The one number for the peer; None when there is none."""
        return percentile(self.theirs, self.percent) if self.theirs else None

    @property
    def ratio(self) -> float | None:
        """Ours over theirs; None when there is nothing to divide by."""
        return self.our_value / self.their_value if self.their_value else None

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without one, or without the peer."""
        if self.limit is not None:
            return self.our_value >= self.limit if self.at_least else self.our_value <= self.limit
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio >= self.goal if self.at_least else self.ratio <= self.goal

    @property
    def verdict(self) -> str:
        """One word, or why there is none."""
        if self.missing:
            return f"no peer: {self.missing}"
        return {True: "reached", False: "MISSED", None: ""}[self.reached]

    @property
    def wanted(self) -> str:
        """The goal as text."""
        if self.limit is not None:
            return f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}"
        return "" if self.goal is None else f"{'>=' if self.at_least else '<='} {self.goal:g} x"

    def as_json(self) -> dict[str, Any]:
        """Everything, with the samples; of very many, their percentiles."""
        samples = {"ours": _thinned(self.ours), "theirs": _thinned(self.theirs)}
        return {**asdict(self), **samples, "ratio": self.ratio, "reached": self.reached}


def percentile(samples: Sequence[float], percent: int) -> float:
    """The 50th is the median."""
    if len(samples) == 1:
        return samples[0]
    return quantiles(samples, n=100, method="inclusive")[percent - 1]


def _thinned(samples: Sequence[float]) -> list[float]:
    return list(samples) if len(samples) <= MAX_KEPT else quantiles(samples, n=100, method="inclusive")


_HEADINGS = ("what", "unit", "ours", "peer", "theirs", "ratio", "goal", "")


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, one block for each axis."""
    lines = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS) - 1)]
    heading, *drawn = (_drawn(line, widths) for line in lines)
    text = [heading, "-" * len(heading)]
    axis = rows[0].axis if rows else ""
    for row, line in zip(rows, drawn, strict=True):
        text += [line] if row.axis == axis else ["", line]
        axis = row.axis
    return "\n".join(text)


def _drawn(line: tuple[str, ...], widths: Sequence[int]) -> str:
    *aligned, verdict = line
    return "  ".join([*(cell.ljust(width) for cell, width in zip(aligned, widths, strict=True)), verdict]).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    ours = _number(row.our_value if row.ours else None, ".4g")
    theirs, ratio = _number(row.their_value, ".4g"), _number(row.ratio, ".3f")
    return row.what, row.unit, ours, row.peer, theirs, ratio, row.wanted, row.verdict


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
