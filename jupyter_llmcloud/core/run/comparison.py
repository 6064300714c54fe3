"""Runs beside each other: what differs in their options, where they ran, their code and their metrics."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.errors import UsageError

Curve = Mapping[float, float]  # the value of a metric by step


@dataclass(frozen=True)
class ComparedRun:
    """What is compared of a run.

    Attributes:
        facts: what it was asked for and where it ran, flat: {"plan": "ddp", "torch": "2.13.0"}.
        metrics: of its first rank.
    """

    run_id: str
    source: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class RunDifferences:
    """What differs.

    Attributes:
        facts: (name, its value in each run, None where it has none) of those that are not alike.
        metrics: (name, the last value in each run, the first step at which a run has not the first one's value).
        code: for each run but the first, its unified difference to the first one's source; "" where it is the same.
    """

    runs: list[str]
    facts: list[tuple[str, list[Any]]]
    metrics: list[tuple[str, list[float | None], float | None]]
    code: list[str]

    @property
    def has_same_metrics(self) -> bool:
        """Whether every value of every metric is that of the first run."""
        return bool(self.metrics) and all(step is None for _, _, step in self.metrics)


def compare(runs: Sequence[ComparedRun], tolerance: float = 0.0) -> RunDifferences:
    """Compare runs with the first of them; values within `tolerance` (relative) are the same.

    Raises UsageError for fewer than two.
    """
    if len(runs) < 2:
        raise UsageError("compare: name at least two runs.")
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    facts = [(name, [run.facts.get(name) for run in runs]) for name in names]
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    return RunDifferences(
        [run.run_id for run in runs],
        [(name, values) for name, values in facts if any(value != values[0] for value in values)],
        [_metric(name, [run.metrics.get(name, {}) for run in runs], tolerance) for name in metrics],
        [_difference(runs[0], run) for run in runs[1:]],
    )


def _metric(name: str, curves: Sequence[Curve], tolerance: float) -> tuple[str, list[float | None], float | None]:
    last = [curve[max(curve)] if curve else None for curve in curves]
    steps = sorted({step for curve in curves for step in curve})
    first = next(
        (step for step in steps if any(not _same(curves[0].get(step), c.get(step), tolerance) for c in curves[1:])),
        None,
    )
    return name, last, first


def _same(one: float | None, other: float | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other or math.isclose(one, other, rel_tol=tolerance, abs_tol=0.0)


def _difference(one: ComparedRun, other: ComparedRun) -> str:
    lines = difflib.unified_diff(
        one.source.splitlines(), other.source.splitlines(), one.run_id, other.run_id, lineterm="", n=2
    )
    return "\n".join(lines)
