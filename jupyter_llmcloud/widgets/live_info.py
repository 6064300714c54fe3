"""What a view says of a run while it goes on, as the structs that front ends take. Pure."""

from __future__ import annotations

import math

from jupyter_llmcloud.core.metrics import wording
from jupyter_llmcloud.core.metrics.progress import Bar
from jupyter_llmcloud.core.metrics.series import Series
from jupyter_llmcloud.core.run.end_report import cost_so_far
from jupyter_llmcloud.core.run.time_split import shares_of
from jupyter_llmcloud.protocol.http.events import (
    LatestValue,
    ProgressBar,
    RankInfo,
    RunActions,
    RunInfo,
)
from jupyter_llmcloud.protocol.http.worlds import Split
from jupyter_llmcloud.widgets.static_view import MAX_CHARTS
from jupyter_llmcloud.widgets.view_state import ViewState

_DIGITS = 6  # of a value on a chart


def live_info(state: ViewState, created: float) -> RunInfo:
    """What the kernel knows of its run; the server knows more."""
    return RunInfo(
        run_id=state.run_id,
        name=state.name,
        state=state.state,
        created=created,
        elapsed_s=state.elapsed_s,
        phase="running" if state.is_active else "ended",
        world_size=len(state.ranks),
        ranks=[
            RankInfo(
                rank=rank, state=how, detail=why, split=split_of(state, rank), total_split=total_split_of(state, rank)
            )
            for rank, (how, why) in sorted(state.shown_ranks.items())
        ],
        progress=bars(state),
        notice=notice(state),
        latest=all_latest(state),
        log_scales=sorted(state.log),
        num_left_out=state.metrics.num_left_out + max(0, len(state.metrics.series) - MAX_CHARTS),
        actions=RunActions(stop=state.is_active),
    )


def split_of(state: ViewState, rank: int) -> Split | None:
    """Where the time of a rank goes now, or has gone; None when it is not known."""
    parts = state.split_of(rank)
    return Split(**parts) if parts else None


def total_split_of(state: ViewState, rank: int) -> Split | None:
    """Where all of its time has gone; None when it is not known."""
    seconds = state.seconds.get(rank)
    return Split(**shares_of(seconds)) if seconds else None


def notice(state: ViewState) -> str:
    """What hinders the run now."""
    late = [state.hang.headline] if state.hang else []
    return " · ".join([*late, *wording.alarms(state.metrics.series)])


def cost(state: ViewState) -> str:
    """What a run that goes on has cost, and will in the end; "" where no price is known or nothing has been told."""
    spent = sum(sum(parts.values()) for parts in state.seconds.values())
    if not state.is_active or not spent:
        return ""
    outer = next((bar for bar in state.metrics.progress.shown() if bar.total), None)
    left = outer.time_left(outer.updated) if outer is not None and not state.hang else None
    return cost_so_far(state.price, spent, len(state.ranks), left)


def bars(state: ViewState) -> list[ProgressBar]:
    """The progress bars, the outer one first, with the cost; what a hang makes of the time left."""
    said = cost(state)
    return [
        ProgressBar(
            desc=bar.desc if number else " · ".join(filter(None, [bar.desc, said])),
            done=bar.done,
            total=bar.total,
            fraction=bar.fraction,
            rate=bar.rate,
            eta=None if state.hang or not state.is_active else _finite(bar.eta(bar.updated)),
            eta_range=None if state.hang or not state.is_active else _eta_range(bar),
            waits=state.hang.waits if state.hang else "",
        )
        for number, bar in enumerate(state.metrics.progress.shown())
    ]


def _eta_range(bar: Bar) -> tuple[float, float] | None:
    span = bar.time_left(bar.updated)
    return None if span is None else (rounded(span.low) or 0.0, rounded(span.high) or 0.0)


def all_latest(state: ViewState) -> dict[str, LatestValue]:
    """The newest value of each metric; of a loss also where it will be in the end, while the run goes on."""
    metrics = state.metrics
    return {
        name: latest(series, state.forecasts.text(name, metrics.series, metrics.progress) if state.is_active else "")
        for name, series in metrics.series.items()
        if series.last
    }


def latest(series: Series, forecast: str = "") -> LatestValue:
    """The newest value that all ranks have reached; there is one."""
    last = series.last
    assert last is not None
    notes = [wording.mean_of(series), wording.waiting_for(series), forecast]
    return LatestValue(
        step=last.step,
        value=last.mean,
        text=wording.point_value(series, last),
        note=" · ".join(filter(None, notes)),
        ranks=wording.rank_values(series),
        alarm=wording.since_when(series.not_finite, len(series.logged_by)),
    )


def rounded(value: float | None) -> float | None:
    """A value, to as many digits as a chart shows."""
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
