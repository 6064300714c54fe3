"""A chart as a standalone SVG image: the mean as a line, the spread as a band, round ticks, last value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from jupyter_llmcloud.core.metrics.series import Point
from jupyter_llmcloud.core.output.numerals import format_number, format_tick, ticks

PALETTE = ("#4c86e8", "#2fa98c", "#a06bdc", "#d9903d", "#d7649a", "#3aa3c4")
_GREY = "#7f8894"  # readable on white and on black: the image cannot know the theme around it
_RED = "#d9534f"
WIDTH, HEIGHT = 320, 150
_SCALE = 2  # coordinates are whole numbers in a box twice as large: half a pixel is exact enough, and short
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 312, 34, 130
_MAX_GAP_MARKS = 12
_MIN_BAND = 0.004
_LARGEST = 1e300  # beyond it the arithmetic of axes overflows


@dataclass(frozen=True)
class _Frame:
    """Where data lies on the image."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, step: float) -> int:
        return round(_SCALE * (_LEFT + (_RIGHT - _LEFT) * (step - self.x_low) / (self.x_high - self.x_low)))

    def y(self, value: float) -> int:
        share = (_bounded(value) - self.y_low) / (self.y_high - self.y_low)
        return round(_SCALE * (_BOTTOM - (_BOTTOM - _TOP) * share))


def svg(name: str, points: Sequence[Point], last: Point | None, color: str = PALETTE[0]) -> str:
    """The image of one metric. Names are escaped; there is no script and nothing from outside."""
    frame = _frame(points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {_SCALE * WIDTH} {_SCALE * HEIGHT}" font-family="system-ui,sans-serif" fill="{_GREY}" '
        f'font-size="21"><text x="16" y="34" font-size="25" font-weight="600">{escape(name)}</text>',
        f'<text x="624" y="34" font-size="25" font-weight="600" text-anchor="end" fill="{color}">'
        f"{escape(format_number(last.mean) if last else '')}</text>",
        *_axes(frame),
        *_band(points, frame, color),
        *_line(points, frame, color),
        *_gaps(points, frame),
        "</svg>",
    ]
    return "".join(parts)


def _frame(points: Sequence[Point]) -> _Frame:
    steps = [point.step for point in points] or [0.0]
    lows = [_bounded(point.low) for point in points if point.low is not None] or [0.0]
    highs = [_bounded(point.high) for point in points if point.high is not None] or [1.0]
    x_low, x_high, y_low, y_high = min(steps), max(steps), min(lows), max(highs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    margin = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 1.0
    return _Frame(x_low, x_high, y_low - margin, y_high + margin)


def _bounded(value: float) -> float:
    return max(-_LARGEST, min(_LARGEST, value))


def _axes(frame: _Frame) -> list[str]:
    rows = {frame.y(value): format_tick(value) for value in ticks(frame.y_low, frame.y_high, 4)}
    columns = {frame.x(step): format_tick(step) for step in ticks(frame.x_low, frame.x_high, 4)}
    lines = "".join(f"M{2 * _LEFT} {y}H{2 * _RIGHT}" for y in rows)
    left = "".join(f'<text x="{2 * _LEFT - 10}" y="{y + 7}">{text}</text>' for y, text in rows.items())
    below = "".join(f'<text x="{x}" y="{2 * _BOTTOM + 28}">{text}</text>' for x, text in columns.items())
    return [
        f'<path d="{lines}" stroke="{_GREY}" stroke-opacity=".22"/>',
        f'<g text-anchor="end">{left}</g><g text-anchor="middle">{below}</g>',
    ]


def _band(points: Sequence[Point], frame: _Frame, color: str) -> list[str]:
    parts = []
    for run in _stretches(points):
        spread = max((point.high or 0.0) - (point.low or 0.0) for point in run)
        if spread > _MIN_BAND * (frame.y_high - frame.y_low):
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


def _gaps(points: Sequence[Point], frame: _Frame) -> list[str]:
    at = [frame.x(point.step) for point in points if point.mean is None][:_MAX_GAP_MARKS]
    return [f'<path d="M{x} {2 * _BOTTOM}v-14" stroke="{_RED}" stroke-width="4"/>' for x in at]


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
