"""What a metric record holds: its step and its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def as_number(value: Any) -> float | None:
    """A number to draw, an int where it is one (an axis says 7, not 7.0); NaN for null, which some writers say for it.

    None for what is no number.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else _as_float(value)
    return value if isinstance(value, float) else None


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


class StepCount:
    """The steps of one rank's records: what it says, else how many records without a step there were."""

    def __init__(self, num_without: int = 0) -> None:
        self.num_without = num_without

    def of(self, record: Mapping[str, Any]) -> float:
        """The step of the next record."""
        step = record.get("step")
        number = None if step is None else as_number(step)
        if number is not None and math.isfinite(number):
            return number
        self.num_without += 1
        return self.num_without
