"""A chart as a standalone SVG image. What it shows is decided in `core.metrics.axes`; here it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import log10

from jupyter_llmcloud.core.metrics.axes import Axis, bounded, plan
from jupyter_llmcloud.core.metrics.series import Point
from jupyter_llmcloud.core.output.numerals import format_number

# Text is written in these: a contrast of 4.5 on white, and still of 4 on a dark page, which the image cannot know of.
PALETTE = ("#3a73d9", "#17836b", "#8f5bd0", "#a5670f", "#c2437f", "#137f9f")
GREY = "#6a7683"
RED = "#d03d38"
WIDTHS = {1: 960, 2: 480}  # so many charts fill the row of a notebook
WIDTH, HEIGHT = 320, 150
_SCALE = 2  # coordinates are whole numbers in a box twice as large: half a pixel is exact enough, and short
_TOP, _BOTTOM = 38, 130
_MARGIN = 8
_CHAR = 6  # pixels that a character of a label takes at most
_MIN_BAND = 0.004


@dataclass(frozen=True)
class _Frame:
    """Where data lies on the image."""

    steps: Axis
    values: Axis
    left: int
    right: int
    is_log: bool

    def x(self, step: float) -> int:
        share = (step - self.steps.low) / (self.steps.high - self.steps.low)
        return round(_SCALE * (self.left + (self.right - self.left) * share))

    def y(self, value: float) -> int:
        """Where a value is; at the edge when it lies outside."""
        low, high, value = (self._scaled(number) for number in (self.values.low, self.values.high, value))
        share = max(0.0, min(1.0, (value - low) / (high - low)))
        return round(_SCALE * (_BOTTOM - (_BOTTOM - _TOP) * share))

    def _scaled(self, value: float) -> float:
        return log10(max(value, 1e-307)) if self.is_log else bounded(value)


def svg(
    name: str,
    points: Sequence[Point],
    last: Point | None,
    color: str = PALETTE[0],
    *,
    value: str | None = None,
    note: str = "",
    is_log: bool = False,
    width: int = WIDTH,
) -> str:
    """The image of one metric. Names are escaped; there is no script and nothing from outside.

    Args:
        last: its value is written in the corner, or `value` in its place.
        note: a line below the title.
        is_log: draw powers of ten, where all values allow it.
    """
    shown = plan(points)
    is_log = is_log and shown.log is not None
    values = shown.log if is_log and shown.log is not None else shown.values
    left = _MARGIN + 4 + _CHAR * max(len(text) for _, text in values.ticks)
    frame = _Frame(shown.steps, values, left, width - _MARGIN, is_log)
    words = [note, "log scale" if is_log else "", "" if is_log else shown.outside]
    corner = value if value is not None else format_number(last.mean) if last else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" '
        f'viewBox="0 0 {_SCALE * width} {_SCALE * HEIGHT}" font-family="system-ui,sans-serif" fill="{GREY}" '
        f'font-size="21"><text x="16" y="32" font-size="25" font-weight="600">{escape(name)}</text>',
        f'<text x="{_SCALE * (width - _MARGIN)}" y="32" font-size="25" font-weight="600" text-anchor="end" '
        f'fill="{color}">{escape(corner)}</text>',
        f'<text x="16" y="58" font-size="20">{escape(" · ".join(filter(None, words)))}</text>' if any(words) else "",
        *_axes(frame),
        *_band(points, frame, color),
        *_line(points, frame, color),
        *(_mark(frame.x(first), frame.x(last)) for first, last in shown.marks),
        "</svg>",
    ]
    return "".join(parts)


def _axes(frame: _Frame) -> list[str]:
    rows = [(frame.y(value), text) for value, text in frame.values.ticks]
    lines = "".join(f"M{_SCALE * frame.left} {y}H{_SCALE * frame.right}" for y, _ in rows)
    left = "".join(f'<text x="{_SCALE * frame.left - 10}" y="{y + 7}">{text}</text>' for y, text in rows)
    below = "".join(_column(frame, frame.x(step), text) for step, text in frame.steps.ticks)
    return [
        f'<path d="{lines}" stroke="{GREY}" stroke-opacity=".22"/>',
        f'<g text-anchor="end">{left}</g><g text-anchor="middle">{below}</g>',
    ]


def _column(frame: _Frame, x: int, text: str) -> str:
    """A label below the chart, moved inwards where it would be cut off."""
    half = _CHAR * len(text) * _SCALE // 2
    x = min(x, _SCALE * (frame.right + _MARGIN) - half)
    return f'<text x="{x}" y="{_SCALE * _BOTTOM + 28}">{text}</text>'


def _band(points: Sequence[Point], frame: _Frame, color: str) -> list[str]:
    parts = []
    for run in _stretches(points):
        spread = max((point.high or 0.0) - (point.low or 0.0) for point in run)
        if spread > _MIN_BAND * (frame.values.high - frame.values.low):
            upper = _path(run, frame, lambda point: point.high)
            lower = _path(run[::-1], frame, lambda point: point.low)
            parts.append(f'<path d="M{upper}L{lower}Z" fill="{color}" fill-opacity=".18"/>')
    return parts


def _line(points: Sequence[Point], frame: _Frame, color: str) -> list[str]:
    parts = []
    for run in _stretches(points):
        if len(run) == 1:
            x, y = frame.x(run[0].step), frame.y(run[0].mean or 0.0)
            parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{color}"/>')
        else:
            line = _path(run, frame, lambda point: point.mean)
            parts.append(f'<path d="M{line}" fill="none" stroke="{color}" stroke-width="3.4" stroke-linejoin="round"/>')
    return parts


def _mark(left: int, right: int) -> str:
    """Values that were not finite, beside the axis."""
    return f'<rect x="{left - 2}" y="{_SCALE * _BOTTOM - 12}" width="{right - left + 4}" height="12" fill="{RED}"/>'


def _stretches(points: Sequence[Point]) -> list[list[Point]]:
    """The points between gaps."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if point.mean is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _path(points: Sequence[Point], frame: _Frame, value: Callable[[Point], float | None]) -> str:
    return " ".join(f"{frame.x(point.step)},{frame.y(value(point) or 0.0)}" for point in points)
