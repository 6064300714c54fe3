"""Pictures of a sweep as SVG: they need no library, and stay in a saved notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, MARGIN, TOP = 640, 240, 60, 28
TEXT = 'font-size="11" fill="currentColor"'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {TEXT}>{html.escape(text)}</text>'


class ParameterAxis:
    """Where the values of a parameter are on their axis: 0 at the bottom, 1 at the top.

    Numbers that are spread over more than two powers of ten are shown by their powers.
    """

    def __init__(self, name: str, values: Sequence[Any]) -> None:
        self.name = name
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        self._choices = [] if is_number else sorted({str(value) for value in values})
        self._low: float = min(values) if is_number else 0
        self._high: float = max(values) if is_number else max(1, len(self._choices) - 1)
        self._is_log = is_number and self._low > 0 and self._high / self._low > 100

    def place(self, value: Any) -> float:
        """Of a value."""
        if self._choices:
            value = self._choices.index(str(value))
        low, high = float(self._low), float(self._high)
        if high == low:
            return 0.5
        if self._is_log:
            return math.log(value / low) / math.log(high / low)
        return (float(value) - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """What is written beside the axis."""
        if self._choices:
            return [(self.place(choice), choice[:12]) for choice in self._choices[:8]]
        return [(self.place(value), f"{value:.3g}") for value in dict.fromkeys((self._low, self._high))]


def parallel_coordinates(trials: Sequence[Mapping[str, Any]], metric: str, maximize: bool) -> str:
    """A line for each trial through its parameters and its value; the better, the darker. "" for too few."""
    names = [
        name
        for name in dict.fromkeys(n for t in trials for n in t["params"])
        if all(name in t["params"] for t in trials)
    ]
    if len(trials) < 2 or not names:
        return ""
    axes = [ParameterAxis(name, [trial["params"][name] for trial in trials]) for name in names[:8]]
    last = ParameterAxis(metric, [trial["value"] for trial in trials])
    gap = (WIDTH - 2 * MARGIN) / len(axes)
    sign = -1 if maximize else 1
    ordered = sorted(trials, key=lambda trial: (trial["state"] != "done", sign * trial["value"]))
    ranks = {id(trial): at for at, trial in enumerate(ordered)}
    drawn = []
    for trial in sorted(trials, key=lambda trial: -ranks[id(trial)]):
        places = [axis.place(trial["params"][axis.name]) for axis in axes] + [last.place(trial["value"])]
        points = " ".join(f"{MARGIN + at * gap:.1f},{_y(place):.1f}" for at, place in enumerate(places))
        share = 1 - ranks[id(trial)] / max(1, len(trials) - 1)
        colour, width = ("#d9480f", 2.5) if not ranks[id(trial)] else ("#1c7ed6", 1)
        told = f"trial {trial['number']}: {trial['value']:.4g}"
        drawn.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" '
            f'opacity="{0.15 + 0.85 * share:.2f}"><title>{html.escape(told)}</title></polyline>'
        )
    lines = [_axis(axis, MARGIN + at * gap) for at, axis in enumerate([*axes, last])]
    label = f"Parallel coordinates of {len(trials)} trials; the best is orange"
    return _svg(HEIGHT, label, [*drawn, *lines])


def _y(place: float) -> float:
    return HEIGHT - 20 - place * (HEIGHT - 20 - TOP)


def _axis(axis: ParameterAxis, x: float) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_y(0):.1f}" y2="{_y(1):.1f}" stroke="currentColor"/>'
    ticks = "".join(_text(x + 4, _y(place) + 4, text, "start") for place, text in axis.ticks())
    return line + _text(x, 14, axis.name[:16]) + ticks


def importance_bars(importance: Mapping[str, float]) -> str:
    """How much each parameter matters; "" when nothing is known."""
    if not importance:
        return ""
    rows, height = [], 20 * len(importance) + 8
    for at, (name, share) in enumerate(importance.items()):
        y = 4 + 20 * at
        width = share * (WIDTH - 260)
        rows.append(f'<rect x="150" y="{y}" width="{width:.1f}" height="14" fill="#1c7ed6"/>')
        rows.append(_text(144, y + 11, name[:22], "end") + _text(156 + width, y + 11, f"{share:.0%}", "start"))
    return _svg(height, "Importance of the parameters", rows)


def _svg(height: int, label: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" style="max-width:100%"'
    return f'<svg role="img" aria-label="{html.escape(label)}" {size}>{"".join(parts)}</svg>'


def rate_curve(points: Sequence[tuple[float, float]], marked: float | None) -> str:
    """Losses at growing learning rates, with the one that is suggested; "" for too few."""
    known = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
    if len(known) < 2:
        return ""
    across = ParameterAxis("learning rate", [rate for rate, _ in known])
    first = known[0][1]
    up = ParameterAxis("loss", [loss for _, loss in known if loss <= 2 * abs(first) + first] or [first])
    line = " ".join(f"{_x(across.place(rate)):.1f},{_y(min(1.0, up.place(loss))):.1f}" for rate, loss in known)
    parts = [f'<polyline points="{line}" fill="none" stroke="#1c7ed6" stroke-width="1.5"/>', _axis(up, MARGIN)]
    parts += [_text(_x(place), HEIGHT - 4, text) for place, text in across.ticks()]
    if marked is not None:
        x = _x(across.place(marked))
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_y(0):.1f}" y2="{_y(1):.1f}" stroke="#d9480f"/>')
        parts.append(_text(x, 14, f"{marked:.2g}"))
    return _svg(HEIGHT, "Loss at growing learning rates", parts)


def _x(place: float) -> float:
    return MARGIN + place * (WIDTH - 2 * MARGIN)
