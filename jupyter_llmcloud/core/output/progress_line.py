"""How far a run is, in one line of a terminal."""

from __future__ import annotations

from jupyter_llmcloud.core.metrics import wording
from jupyter_llmcloud.core.metrics.progress import Bar
from jupyter_llmcloud.core.metrics.series import MetricCollector
from jupyter_llmcloud.core.output.numerals import format_count, format_duration, format_number
from jupyter_llmcloud.core.run.end_report import cost_so_far

BAR_WIDTH = 20
MAX_METRICS = 4
NOTHING_SPENT = (0.0, 0.0, 0)
_FULL, _EMPTY = "━", "─"


def progress_line(
    name: str,
    state: str,
    metrics: MetricCollector,
    elapsed_s: float,
    now: float,
    width: int,
    spent: tuple[float, float, int] = NOTHING_SPENT,
) -> str:
    """`long  ━━━━━─────  31 %  310/1,000  2.4/s  3 min 2 s left  loss 2.31`, cut to `width`.

    Args:
        name: of the run.
        state: said when it is not running.
        metrics: its metrics and progress.
        elapsed_s: how long it has been there.
        now: the time, in seconds of the records' clock.
        width: of the terminal.
        spent: the price of an hour of a rank, the seconds of all ranks so far, how many ranks there are.
    """
    bars = metrics.progress.shown()
    parts = [name]
    if state != "running":
        parts.append(state)
    for bar in bars[:1]:
        parts += _bar(bar, now)
    if not bars or bars[0].eta(now) is None:
        parts.append(format_duration(elapsed_s))
    left = bars[0].time_left(now) if bars and bars[0].total else None
    parts += filter(None, [cost_so_far(*spent, left)])
    parts += [f"{name} {wording.last_value(series)}" for name, series in [*metrics.series.items()][:MAX_METRICS]]
    line = "  ".join(parts)
    return line if len(line) <= width else line[: max(0, width - 1)] + "…"


def _bar(bar: Bar, now: float) -> list[str]:
    done = format_count(bar.done)
    parts = [bar.desc] if bar.desc else []
    if bar.total and bar.fraction is not None:
        filled = round(BAR_WIDTH * bar.fraction)
        parts += [_FULL * filled + _EMPTY * (BAR_WIDTH - filled), f"{100 * bar.fraction:.0f} %"]
        done = f"{done}/{format_count(bar.total)}"
    parts.append(done)
    if bar.rate:
        parts.append(f"{format_number(bar.rate, 3)}/s")
    if (left := bar.eta(now)) is not None and not bar.is_complete:
        parts.append(f"ETA {format_duration(left)}{_interval(bar, now)}")
    return parts


def _interval(bar: Bar, now: float) -> str:
    """` (4 min to 6 min)`, where its ends differ as they are written."""
    span = bar.time_left(now)
    low, high = (format_duration(span.low), format_duration(span.high)) if span else ("", "")
    return f" ({low} to {high})" if low != high else ""
