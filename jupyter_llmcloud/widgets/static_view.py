"""A run as it stays in the saved notebook: HTML without script or style sheet, and text. Pure functions.

What survives where: GitHub, and JupyterLab in a notebook that is not trusted, strip inline `<svg>` and
`<style>` from HTML output; both keep `<table>` and `<img>` and do not check the scheme of an image's `src`.
So each chart is an `<img>` with a base64 SVG (in which no script can run), and the numbers, with a sparkline
of block characters, are a plain table: where even images are dropped (nbconvert's strictest sanitizer) the
whole story is left as text.
"""

from __future__ import annotations

import base64
from html import escape

from jupyter_llmcloud.core.metrics.series import Series
from jupyter_llmcloud.core.output.numerals import format_duration, format_number, sparkline
from jupyter_llmcloud.widgets import chart
from jupyter_llmcloud.widgets.view_state import Chip, ViewState, grouped, name_ranks, short

MAX_CHARTS = 20
MAX_ROWS = 30
MAX_ERRORS = 8
MAX_REPORTS = 8
_POINTS_IN_ALL = 700
_COLUMNS = {"metric": "left", "trend": "left", "last": "right", "lowest": "right", "highest": "right"}
_MARKS = {
    "finished": ("✓", "#2fa98c"),
    "failed": ("✗", "#d9534f"),
    "stopped": ("■", "#d9903d"),
    "lost": ("?", "#7f8894"),
}
_RUNNING = ("●", "#4c86e8")


def html(state: ViewState) -> str:
    """The run as HTML."""
    parts = [_title(state), *_errors(state), *_reports(state), _charts(state), _table(state), _ranks(state)]
    return f"<div>{''.join(part for part in parts if part)}</div>"


def text(state: ViewState) -> str:
    """The run as plain text: a line on how it went, a line for each metric."""
    lines = [summary(state)]
    lines += [f"  {line}" for line in [*_error_lines(state), *_report_lines(state)]]
    shown = list(state.metrics.series.values())[:MAX_ROWS]
    names = [short(series.name) for series in shown]
    width = max(map(len, names), default=0)
    for name, series in zip(names, shown, strict=True):
        trend = sparkline([point.mean for point in series.points(240)])
        words = [
            f"  {name.ljust(width)}  {trend.ljust(24)}  {_last(series)}",
            _best(series),
            _warning(series),
        ]
        lines.append("   ".join(word for word in words if word))
    if rest := _rest(state):
        lines.append(f"  {rest}")
    return "\n".join(lines)


def summary(state: ViewState) -> str:
    """One line on how a run went: its name, state, duration and ranks."""
    mark, _ = _MARKS.get(state.state, _RUNNING)
    how = state.state if state.is_active else f"{state.state} after"
    how = "finished in" if state.state == "finished" else how
    return f"{mark} {state.name} · {how} {format_duration(state.elapsed_s)} · {_ranks_in_words(state)}"


def _title(state: ViewState) -> str:
    mark, color = _MARKS.get(state.state, _RUNNING)
    line = escape(summary(state).removeprefix(mark).strip().removeprefix(state.name))
    return f'<p><span style="color:{color}">{mark}</span> <b>{escape(state.name)}</b>{line}</p>'


def _ranks_in_words(state: ViewState) -> str:
    states = {rank_state for rank_state, _ in state.ranks.values()}
    return name_ranks(state.ranks) if len(states) < 2 else f"{len(state.ranks)} ranks"


def _error_lines(state: ViewState) -> list[str]:
    lines = []
    for error in state.errors[:MAX_ERRORS]:
        who = f"rank {error['rank']}: " if error.get("rank") is not None else ""
        first = str(error.get("evalue", "")).strip().split("\n")[0]
        lines.append(short(f"{who}{error.get('ename', 'error')}{': ' if first else ''}{first}", 300))
    if len(state.errors) > MAX_ERRORS:
        lines.append(f"… and {len(state.errors) - MAX_ERRORS} more errors")
    return lines


def _errors(state: ViewState) -> list[str]:
    color = _MARKS["failed"][1]
    return [f'<p style="color:{color}">{escape(line)}</p>' for line in _error_lines(state)]


def _report_lines(state: ViewState) -> list[str]:
    more = len(state.reports) - MAX_REPORTS
    lines = [f"{'✓' if recovered else '⚠'} {short(text, 400)}" for text, recovered in state.reports[:MAX_REPORTS]]
    return [*lines, f"… and {more} more reports"] if more > 0 else lines


def _reports(state: ViewState) -> list[str]:
    color = _MARKS["stopped"][1]
    return [f'<p style="color:{color}">{escape(line)}</p>' for line in _report_lines(state)]


def _charts(state: ViewState) -> str:
    shown = [series for series in list(state.metrics.series.values())[:MAX_CHARTS] if series.num_values > 1]
    images = []
    for number, series in enumerate(shown):
        points = series.points(max(24, min(100, _POINTS_IN_ALL // len(shown))))
        color = chart.PALETTE[number % len(chart.PALETTE)]
        image = base64.b64encode(chart.svg(short(series.name, 24), points, series.last, color).encode()).decode()
        alt = escape(f"{short(series.name)}: last {_last(series)}", quote=True)
        size = f'width="{chart.WIDTH}" height="{chart.HEIGHT}"'
        images.append(f'<img alt="{alt}" {size} src="data:image/svg+xml;base64,{image}">')
    return f"<p>{' '.join(images)}</p>" if images else ""


def _table(state: ViewState) -> str:
    shown = list(state.metrics.series.values())[:MAX_ROWS]
    if not shown:
        return ""
    head = "".join(f"<th {_aligned(align)}>{name}</th>" for name, align in _COLUMNS.items())
    rows = "".join(_row(number, series) for number, series in enumerate(shown))
    rest = _rest(state)
    tail = f"<p>{escape(rest)}</p>" if rest else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{tail}"


def _aligned(side: str) -> str:
    # The attribute for where styles are stripped, the style for where a style sheet overrules the attribute.
    return f'align="{side}" style="text-align:{side}"'


def _row(number: int, series: Series) -> str:
    trend = sparkline([point.mean for point in series.points(240)], 16)
    color = chart.PALETTE[number % len(chart.PALETTE)]
    left, right = _aligned("left"), _aligned("right")
    cells = [
        f"<td {left}>{escape(short(series.name))}</td>",
        f'<td {left}><span style="color:{color}">{trend}</span></td>',
        f"<td {right}><b>{_last(series)}</b></td>",
    ]
    for extreme in (series.lowest, series.highest):
        words = f"{format_number(extreme.value)} at {format_number(extreme.step)}" if extreme else ""
        cells.append(f"<td {right}>{words}</td>")
    warning = _warning(series)
    return f"<tr>{''.join(cells)}{f'<td>{warning}</td>' if warning else ''}</tr>"


def _last(series: Series) -> str:
    return format_number(series.last.mean) if series.last else ""


def _best(series: Series) -> str:
    if not series.lowest or not series.highest:
        return ""
    return f"lowest {format_number(series.lowest.value)}, highest {format_number(series.highest.value)}"


def _warning(series: Series) -> str:
    if not series.num_not_finite:
        return ""
    return f"⚠ {series.num_not_finite:,} not finite, first at step {format_number(series.first_not_finite)}"


def _rest(state: ViewState) -> str:
    more = max(0, len(state.metrics.series) - MAX_ROWS)
    if not more and not state.metrics.num_left_out:
        return ""
    return f"… more metrics: %runs show {state.run_id}"


def _ranks(state: ViewState) -> str:
    if state.report and state.state != "finished":
        return f"<p>{escape(' · '.join(short(line.rstrip('.'), 200) for line in state.report[:12]))}</p>"
    groups = grouped(state.ranks)
    if len(groups) == 1 and groups[0].state == "done":
        return ""
    words = [f"{chip.label}: {chip.state}{f' ({short(chip.detail, 120)})' if chip.detail else ''}" for chip in groups]
    return f"<p>{escape(' · '.join(words[:12]))}</p>" if words else ""


def _reason(chip: Chip) -> str:
    return f" ({short(chip.detail, 120)})" if chip.detail else ""
