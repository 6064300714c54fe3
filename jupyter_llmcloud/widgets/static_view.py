"""A run as it stays in the saved notebook: HTML without script or style sheet, and text. Pure functions.

What survives where: GitHub, and JupyterLab in a notebook that is not trusted, strip inline `<svg>` and
`<style>` from HTML output; both keep `<table>` and `<img>` and do not check the scheme of an image's `src`.
So each chart is an `<img>` with a base64 SVG (in which no script can run), and the numbers, with a sparkline
of block characters, are a plain table: where even images are dropped (nbconvert's strictest sanitizer) the
whole story is left as text.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from jupyter_llmcloud.core.metrics import wording
from jupyter_llmcloud.core.metrics.series import Extreme, Series
from jupyter_llmcloud.core.names import name_ranks, short_name
from jupyter_llmcloud.core.output.numerals import format_count, format_duration, format_number, sparkline
from jupyter_llmcloud.core.run.time_split import in_words
from jupyter_llmcloud.widgets import chart
from jupyter_llmcloud.widgets.view_state import ViewState, grouped, short, without_advice

MAX_CHARTS = 20
MAX_ROWS = 26
MAX_ERRORS = 8
MAX_REPORTS = 8
MAX_TIMES = 6
_ALIKE = 0.03
_POINTS_IN_ALL = 480
_COLUMNS = {"metric": "left", "trend": "left", "last": "right", "lowest": "right", "highest": "right"}
_OPTIONAL = {"ranks": "left", "": "left"}
_ONE_LINE = ("last", "lowest", "highest")
_BLUE, _GREEN, _AMBER = chart.PALETTE[0], chart.PALETTE[1], chart.PALETTE[3]
_MARKS = {"finished": ("✓", _GREEN), "failed": ("✗", chart.RED), "stopped": ("■", _AMBER), "lost": ("?", chart.GREY)}
_RUNNING = ("●", _BLUE)


def html(state: ViewState, *, says_how_to_follow: bool = True) -> str:
    """The run as HTML."""
    parts = [
        _title(state),
        *_errors(state),
        *_reports(state),
        _charts(state),
        _table(state),
        _ranks(state),
        _times(state),
    ]
    if state.is_active and says_how_to_follow:
        parts.append(
            f"<p>The run goes on; this is how it was. <code>%runs attach {escape(state.name)}</code> follows it.</p>"
        )
    return f"<div>{''.join(part for part in parts if part)}</div>"


def text(state: ViewState) -> str:
    """The run as plain text: a line on how it went, a line for each metric."""
    lines = [summary(state)]
    lines += [f"  {line}" for line in [*_error_lines(state), *_report_lines(state)]]
    shown = list(state.metrics.series.values())[:MAX_ROWS]
    names = [short_name(series.name) for series in shown]
    width = max(map(len, names), default=0)
    for name, series in zip(names, shown, strict=True):
        trend = sparkline([point.mean for point in series.points(240)])
        mean = wording.mean_of(series)
        words = [
            f"  {name.ljust(width)}  {trend.ljust(24)}  {wording.last_value(series)}{f' ({mean})' if mean else ''}",
            _best(series),
            wording.rank_values(series),
            _warning(series),
        ]
        lines.append("   ".join(word for word in words if word))
    if rest := _rest(state):
        lines.append(f"  {rest}")
    lines += [f"  {line}" for line in time_lines(state)]
    return "\n".join(lines)


def time_lines(state: ViewState) -> list[str]:
    """Where the time of the ranks goes, a line for all that are alike within a few percent."""
    shares = {rank: split for rank in sorted(state.ranks) if (split := state.split_of(rank))}
    groups: list[list[int]] = []
    for rank, split in shares.items():
        known = next((group for group in groups if _is_alike(shares[group[0]], split)), None)
        if known is None:
            groups.append([rank])
        else:
            known.append(rank)
    groups = sorted(groups, key=len)[:MAX_TIMES]
    return [f"time of {name_ranks(group)}: {in_words(_mean([shares[rank] for rank in group]))}" for group in groups]


def _is_alike(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return all(abs(share - other[part]) < _ALIKE for part, share in one.items())


def _mean(splits: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: sum(split[part] for split in splits) / len(splits) for part in splits[0]}


def _times(state: ViewState) -> str:
    lines = time_lines(state)
    return f"<p>{'<br>'.join(map(escape, lines))}</p>" if lines else ""


def summary(state: ViewState) -> str:
    """One line on how a run went: its name, state, duration and ranks, and what is NaN."""
    mark, _ = _MARKS.get(state.state, _RUNNING)
    how = state.state if state.is_active else f"{state.state} after"
    how = "finished in" if state.state == "finished" else how
    words = [state.name, f"{how} {format_duration(state.elapsed_s)}", _ranks_in_words(state)]
    return f"{mark} {' · '.join([*words, *(f'⚠ {alarm}' for alarm in wording.alarms(state.metrics.series))])}"


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
    shown = [(text if state.is_active else without_advice(text), recovered) for text, recovered in state.reports]
    lines = [f"{'✓' if recovered else '⚠'} {short(text, 400)}" for text, recovered in shown[:MAX_REPORTS]]
    return [*lines, f"… and {more} more reports"] if more > 0 else lines


def _reports(state: ViewState) -> list[str]:
    color = _MARKS["stopped"][1]
    return [f'<p style="color:{color}">{escape(line)}</p>' for line in _report_lines(state)]


def _charts(state: ViewState) -> str:
    shown = []
    for number, series in enumerate(list(state.metrics.series.values())[:MAX_CHARTS]):
        color = chart.PALETTE[number % len(chart.PALETTE)]
        if len(series.points(8)) > 1:
            shown.append((series, color))
    images = [_image(series, color, len(shown), series.name in state.log) for series, color in shown]
    return f"<p>{' '.join(images)}</p>" if images else ""


def _image(series: Series, color: str, num_charts: int, is_log: bool) -> str:
    width = chart.WIDTHS.get(num_charts, chart.WIDTH)
    source = chart.svg(
        short_name(series.name, 24 * width // chart.WIDTH),
        series.points(max(24, min(100 * width // chart.WIDTH, _POINTS_IN_ALL // num_charts))),
        series.last,
        color,
        value=wording.last_value(series),
        note=" · ".join(filter(None, (wording.mean_of(series), _since(series)))),
        is_log=is_log,
        width=width,
    )
    alt = escape(f"{short_name(series.name)}: last {wording.last_value(series)} {wording.mean_of(series)}", quote=True)
    size = f'width="{width}" height="{chart.HEIGHT}"'
    if num_charts in chart.WIDTHS:  # one or two fill the row, however wide it is
        size = f'width="{98 // num_charts}%" style="max-width:{width}px"'
    image = base64.b64encode(source.encode()).decode()
    return f'<img alt="{alt.rstrip()}" {size} src="data:image/svg+xml;base64,{image}">'


def _table(state: ViewState) -> str:
    shown = list(state.metrics.series.values())[:MAX_ROWS]
    if not shown:
        return ""
    rows = [_row(number, series) for number, series in enumerate(shown)]
    # A column that no row needs is left out.
    optional = {name: side for name, side in _OPTIONAL.items() if any(row[name] for row in rows)}
    columns = _COLUMNS | optional
    head = "".join(f"<th {aligned(side)}>{name}</th>" for name, side in columns.items())
    body = "".join(
        f"<tr>{''.join(_cell(name, side, row[name]) for name, side in columns.items())}</tr>" for row in rows
    )
    rest = _rest(state)
    tail = f"<p>{escape(rest)}</p>" if rest else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{tail}"


def _cell(name: str, side: str, text: str) -> str:
    style = "white-space:nowrap" if name in _ONE_LINE else ""
    return f"<td {aligned(side, style)}>{text}</td>"


def aligned(side: str, style: str = "") -> str:
    """Attributes of a cell whose text is at its `left` or `right`."""
    # The attribute for where styles are stripped, the style for where a style sheet overrules the attribute.
    return f'align="{side}" style="{";".join(filter(None, (f"text-align:{side}", style)))}"'


def _row(number: int, series: Series) -> dict[str, str]:
    """The cells of a metric by their column."""
    trend = sparkline([point.mean for point in series.points(240)], 16)
    color = chart.PALETTE[number % len(chart.PALETTE)]
    mean = wording.mean_of(series)
    return {
        "metric": escape(short_name(series.name)),
        "trend": f'<span style="color:{color}">{trend}</span>',
        "last": f"<b>{wording.last_value(series)}</b>{f'<br>{mean}' if mean else ''}",
        "lowest": _extreme(series.lowest),
        "highest": _extreme(series.highest),
        "ranks": wording.rank_values(series),
        "": _warning(series),
    }


def _extreme(extreme: Extreme | None) -> str:
    return f"{format_number(extreme.value)} at {format_count(extreme.step)}" if extreme else ""


def _best(series: Series) -> str:
    if not series.lowest or not series.highest:
        return ""
    return f"lowest {format_number(series.lowest.value)}, highest {format_number(series.highest.value)}"


def _since(series: Series) -> str:
    return wording.since_when(series.not_finite, len(series.ranks))


def _warning(series: Series) -> str:
    words = wording.warning(series)
    return f"⚠ {words}" if words else ""


def _rest(state: ViewState) -> str:
    more = max(0, len(state.metrics.series) - MAX_ROWS)
    if not more and not state.metrics.num_left_out:
        return ""
    return f"… more metrics: %runs show {state.run_id}"


def _ranks(state: ViewState) -> str:
    if state.report and state.state != "finished":
        return f"<p>{escape(' · '.join(short(line.rstrip('.'), 200) for line in state.report[:12]))}</p>"
    groups = grouped(state.shown_ranks)
    if len(groups) == 1 and groups[0].state == "done":
        return ""
    words = [f"{chip.label}: {chip.state}{f' ({short(chip.detail, 120)})' if chip.detail else ''}" for chip in groups]
    return f"<p>{escape(' · '.join(words[:12]))}</p>" if words else ""
