"""Which values of a metric were NaN or infinite, and since when. The run's record and every view say it from here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.core.metrics.values import StepCount, as_number

MAX_METRICS = 100
MAX_HALVINGS = 16  # of a GradScaler's first scale, until it is 1

_GRADIENT = re.compile(r"(^|[/_.\s])grad(ient)?[_\s]?norm$", re.IGNORECASE)


@dataclass
class _RankValues:
    """One rank's values that were not finite, as far as its newest step."""

    step: float
    value: float
    count: int
    first: float
    since: float
    is_bad: bool = True
    in_a_row: int = 1
    since_before: float | None = None  # of the stretch before the newest one

    def go_on(self, step: float, value: float) -> None:
        """A value at another step."""
        was_bad, self.step, self.is_bad = self.is_bad, step, not math.isfinite(value)
        self.in_a_row = self.in_a_row + 1 if self.is_bad else 0
        if self.is_bad:
            self._count(step, value, begins=not was_bad)

    def again(self, value: float) -> None:
        """Another value at the newest step: the last one counts."""
        was_bad, self.is_bad = self.is_bad, not math.isfinite(value)
        if self.is_bad and not was_bad:
            self._count(self.step, value, begins=self.since != self.step)
        elif was_bad and not self.is_bad:
            self.count -= 1
            if self.since == self.step and self.since_before is not None:
                self.since, self.since_before = self.since_before, None

    def _count(self, step: float, value: float, begins: bool) -> None:
        self.count += 1
        self.value = value
        self.first = min(self.first, step)
        if begins:
            self.since_before, self.since = self.since, step


class NotFinite:
    """Of one metric, over all ranks."""

    def __init__(self) -> None:
        self._ranks: dict[int, _RankValues] = {}  # those that have logged such a value

    def add(self, rank: int, step: float, value: float) -> bool:
        """Take in a value; True when it is not finite."""
        known = self._ranks.get(rank)
        is_bad = not math.isfinite(value)
        if known is None:
            if is_bad:
                self._ranks[rank] = _RankValues(step, value, count=1, first=step, since=step)
        elif step != known.step:
            known.go_on(step, value)
        else:
            known.again(value)
            if not known.count:
                del self._ranks[rank]
        return is_bad

    @property
    def count(self) -> int:
        """How many values."""
        return sum(rank.count for rank in self._ranks.values())

    @property
    def first(self) -> float | None:
        """The first step with one."""
        return min((rank.first for rank in self._ranks.values()), default=None)

    @property
    def since(self) -> float | None:
        """The first step of the last unbroken stretch."""
        if going_on := [rank.since for rank in self._ranks.values() if rank.is_bad]:
            return min(going_on)
        return max((rank.since for rank in self._ranks.values()), default=None)

    @property
    def ranks(self) -> list[int]:
        """Those whose newest value is not finite."""
        return sorted(number for number, rank in self._ranks.items() if rank.is_bad)

    @property
    def in_a_row(self) -> int:
        """How many values, up to the newest one of the rank that has most."""
        return max((rank.in_a_row for rank in self._ranks.values()), default=0)

    @property
    def word(self) -> str:
        """What they were: `NaN` or `infinite`."""
        return word(*(rank.value for rank in self._ranks.values()))

    def summary(self) -> dict[str, Any]:
        """{"count", "first", "since"}, as the run's record has it."""
        return {"count": self.count, "first": self.first, "since": self.since}


class NotFiniteLog:
    """Of all metrics of a run, from their records.

    Args:
        earlier: what an earlier leader of the run had found.
    """

    def __init__(self, earlier: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._earlier = dict(earlier or {})
        self._metrics: dict[str, NotFinite] = {}
        self._steps: dict[int, StepCount] = {}

    def take(self, rank: int, records: Iterable[Mapping[str, Any]]) -> bool:
        """Take in records of a rank; True when a value was not finite."""
        found = False
        for record in records:
            if not (values := record.get("values")):
                continue
            step = self._steps.setdefault(rank, StepCount()).of(record)
            for name, value in values.items():
                if name in self._metrics:
                    found |= self._metrics[name].add(rank, step, _as_float(value))
                elif not math.isfinite(number := _as_float(value)):
                    found |= self._first(name).add(rank, step, number)
        return found

    def _first(self, name: str) -> NotFinite:
        if len(self._metrics) >= MAX_METRICS:
            return NotFinite()
        return self._metrics.setdefault(name, NotFinite())

    def word(self, name: str) -> str:
        """What the values of a metric are that are not finite: `NaN` or `infinite`."""
        return self._metrics[name].word if name in self._metrics else "NaN"

    def is_expected(self, name: str) -> bool:
        """Whether a metric is a gradient norm that may yet be finite again.

        A GradScaler tries whether its scale is too large: it leaves out the step of such gradients and halves the
        scale. Weights that are broken are seen by the loss of the next step.
        """
        return bool(_GRADIENT.search(name)) and name in self._metrics and self._metrics[name].in_a_row <= MAX_HALVINGS

    def summary(self) -> dict[str, dict[str, Any]]:
        """{metric: {"count", "first", "since"}}, for those that had any."""
        found = {name: metric.summary() for name, metric in self._metrics.items() if metric.count}
        return {
            name: _joined(self._earlier.get(name), found.get(name)) for name in dict.fromkeys([*self._earlier, *found])
        }


def _as_float(value: Any) -> float:
    number = as_number(value)
    return 0.0 if number is None else number


def _joined(earlier: Mapping[str, Any] | None, later: Mapping[str, Any] | None) -> dict[str, Any]:
    if earlier is None or later is None:
        return dict(earlier or later or {})
    return {
        "count": earlier["count"] + later["count"],
        "first": min(earlier["first"], later["first"]),
        "since": later["since"],
    }


def word(*values: float | None) -> str:
    """`NaN` where one of the values is, else `infinite`."""
    return "NaN" if any(value is None or math.isnan(value) for value in values) else "infinite"
