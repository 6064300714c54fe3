"""What a chart shows, decided by values: the ranges of its axes, their ticks, and what is said of what lies outside.

Whatever draws (an SVG image, a page) is handed a `ChartPlan` and decides nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jupyter_llmcloud.core.metrics.series import Point
from jupyter_llmcloud.core.output.numerals import format_number, format_tick, ticks

LARGEST, SMALLEST = 1e300, 1e-300  # beyond them the arithmetic of axes overflows
MARGIN = 0.06
FEWEST = 8  # points of which some may be outliers
OUTLIERS = 0.05  # of the points at each end
FLATTENED = 5.0  # a range so many times that of the other points makes a line of them
FLAT = 1e-9  # of a value: what no label could tell apart
MAX_MARKS = 24
MIN_TICKS = 2
MAX_DIGITS = 12


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with round numbers and how they are written."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class ChartPlan:
    """How a series is drawn.

    Attributes:
        steps: the horizontal axis.
        values: the vertical axis. Rare values far from the others may lie outside; `outside` says so.
        log: the vertical axis in powers of ten, of all values; None where one is zero or negative.
        outside: `up to 1,204 above`, or "".
        marks: from which to which step values were not finite; where the mean is None as well, the line has a gap.
    """

    steps: Axis
    values: Axis
    log: Axis | None
    outside: str
    marks: tuple[tuple[float, float], ...]


def plan(points: Sequence[Point]) -> ChartPlan:
    """The plan of these points."""
    drawn = [point for point in points if point.mean is not None]
    lows = [bounded(point.low or 0.0) for point in drawn] or [0.0]
    highs = [bounded(point.high or 0.0) for point in drawn] or [1.0]
    low, high = _robust(lows, highs)
    return ChartPlan(
        steps=_step_axis([point.step for point in points] or [0.0]),
        values=_value_axis(low, high),
        log=_log_axis(min(lows), max(highs)) if drawn and min(lows) > SMALLEST else None,
        outside=_outside(low, high, min(lows), max(highs)),
        marks=_marks(points),
    )


def bounded(value: float) -> float:
    """What axes can work with."""
    return max(-LARGEST, min(LARGEST, value)) if abs(value) > SMALLEST else 0.0


def _robust(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """The range that shows the curve: not all of it where rare values would make a line of the others."""
    low, high = min(lows), max(highs)
    if len(lows) < FEWEST:
        return low, high
    num_trimmed = max(1, math.floor(OUTLIERS * len(lows)))
    inner_low, inner_high = sorted(lows)[num_trimmed], sorted(highs)[-1 - num_trimmed]
    span = inner_high - inner_low
    if span <= 0 or high - low <= FLATTENED * span:
        return low, high
    return max(low, inner_low - span / 2), min(high, inner_high + span / 2)


def _outside(low: float, high: float, lowest: float, highest: float) -> str:
    words = []
    if highest > high:
        words.append(f"up to {format_number(highest)} above")
    if lowest < low:
        words.append(f"down to {format_number(lowest)} below")
    return ", ".join(words)


def _step_axis(steps: Sequence[float]) -> Axis:
    low, high = min(steps), max(steps)
    is_whole = float(low).is_integer() and float(high).is_integer()
    if low == high:
        low, high = (low - 1, high + 1) if low >= 1 else (low, low + 1)
    return Axis(low, high, _labelled(_at_least_two(low, high, is_whole)))


def _value_axis(low: float, high: float) -> Axis:
    is_flat = high - low <= FLAT * abs(high)
    margin = (abs(high) * 0.1 or 1.0) if is_flat else (high - low) * MARGIN
    low, high = bounded(low - margin), bounded(high + margin)
    return Axis(low, high, _labelled(_at_least_two(low, high)))


def _log_axis(low: float, high: float) -> Axis:
    first, last = math.log10(low), math.log10(high)
    margin = (last - first) * MARGIN or 0.1
    low, high = 10 ** max(-307.0, first - margin), 10 ** min(300.0, last + margin)
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / 4)))]
    if len(powers) < MIN_TICKS:
        scale = 10.0 ** (first - 1)
        between = [scale * factor for factor in (1, 2, 5, 10, 20, 50) if low <= scale * factor <= high]
        powers = between if len(between) >= MIN_TICKS else [n for n in _at_least_two(low, high) if n > 0]
    return Axis(low, high, _labelled(powers))


def _at_least_two(low: float, high: float, is_whole: bool = False) -> list[float]:
    found: list[float] = []
    for count in range(4, 40):
        found = ticks(low, high, count, is_whole=is_whole)
        if len(found) >= MIN_TICKS:
            break
    return found


def _labelled(values: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """Each with its text; with as many digits as it takes to say it, and to tell them apart."""
    texts = [format_tick(value) for value in values]
    near = min((abs(after - before) for before, after in pairwise(values)), default=0.0) / 100
    digits = 4
    while digits <= MAX_DIGITS and any(
        abs(_read(text) - value) > near for text, value in zip(texts, values, strict=True)
    ):
        texts = [format_number(value, digits) for value in values]
        digits += 1
    return tuple(zip(values, texts, strict=True))


def _read(text: str) -> float:
    return float(text.replace(",", ""))


def _marks(points: Sequence[Point]) -> tuple[tuple[float, float], ...]:
    """Stretches of neighbours; of many, the first ones, and the rest as one."""
    found: list[tuple[float, float]] = []
    was_marked = False
    for point in points:
        is_marked = point.mean is None or point.num_not_finite > 0
        if is_marked and was_marked:
            found[-1] = (found[-1][0], point.step)
        elif is_marked:
            found.append((point.step, point.step))
        was_marked = is_marked
    if len(found) > MAX_MARKS:
        found = [*found[: MAX_MARKS - 1], (found[MAX_MARKS - 1][0], found[-1][1])]
    return tuple(found)
