"""Numbers as people read them: values, durations, ticks of an axis, sparklines."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_TICK = 7
LARGE = 1e7  # from here on a number has few digits and a power of ten
MAX_WHOLE = 1 << 53
_BARS = "▁▂▃▄▅▆▇█"


def format_number(value: float | None, digits: int = 4) -> str:
    """At most `digits` significant digits: `2.341`, `12,800`, `3.1e-5`; None is `not finite`."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= LARGE or size < 1e-4:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    decimals = 0 if float(value).is_integer() else max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_step(step: float) -> str:
    """A step as it is looked for, with all of its digits: `60`, `1500000`, `0.5`."""
    return str(int(step)) if math.isfinite(step) and step == int(step) else f"{step:g}"


def format_count(count: float | None) -> str:
    """A number of steps, or of what is counted: whole ones with all of their digits, as `12,345,678`."""
    if count is not None and LARGE <= abs(count) < MAX_WHOLE:
        return f"{count:,.0f}"
    return format_number(count)


def format_tick(value: float) -> str:
    """A number beside an axis, at most 8 characters: `0.00025`, `12,800`, `1.25e6`."""
    text = format_number(value, 3)
    if len(text) <= MAX_TICK:
        return text
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def format_duration(seconds: float) -> str:
    """`0.4 s`, `47 s`, `1 min 12 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit} {rest} {name}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def ticks(low: float, high: float, count: int = 4, *, is_whole: bool = False) -> list[float]:
    """About `count` round numbers from `low` to `high`; with `is_whole` no fractions."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.75)
    if is_whole and not float(step).is_integer():
        step = max(1.0, 2 * size if step == 2.5 * size else step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) if abs(step) > 1e-9 else number * step for number in range(first, last + 1)]


def sparkline(values: Sequence[float | None], width: int = 24) -> str:
    """A chart in a line of text; a gap where nothing was finite."""
    if len(values) > width:
        values = [_mean(values[at * len(values) // width : (at + 1) * len(values) // width]) for at in range(width)]
    finite = [value for value in values if value is not None]
    if not finite:
        return ""
    low, span = min(finite), max(finite) / 2 - min(finite) / 2  # halves: the whole may be more than a number holds
    if not span:
        return "".join(" " if value is None else _BARS[3] for value in values)
    return "".join(" " if value is None else _BARS[min(7, int((value / 2 - low / 2) / span * 8))] for value in values)


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return math.fsum(value / len(finite) for value in finite) if finite else None
