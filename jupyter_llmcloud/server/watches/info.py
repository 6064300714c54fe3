"""What is said of a watched run beside its series and its output. Pure: from its record and its view to values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from jupyter_llmcloud.core.names import short_name
from jupyter_llmcloud.core.output.numerals import format_step
from jupyter_llmcloud.protocol.http.events import (
    Mark,
    Phase,
    RankError,
    RankInfo,
    RunActions,
    RunInfo,
)
from jupyter_llmcloud.storage.runs import RunRecord
from jupyter_llmcloud.widgets.live_info import all_latest, bars, cost, notice, split_of, total_split_of
from jupyter_llmcloud.widgets.view_state import ViewState, without_advice

MAX_MARKS = 500
MARKS = ("checkpoint", "restart", "resize", "alert", "hang")
PHASES = {"queued": "waiting", "running": "running", "stopping": "running"}

RankFacts = Mapping[str, Any]  # what is known of the process of a rank: fields of a RankInfo


def run_info(
    record: RunRecord,
    view: ViewState,
    now: float,
    *,
    marks: Sequence[Mapping[str, Any]] = (),
    reports: Sequence[Mapping[str, Any]] = (),
    ranks: Mapping[int, RankFacts] | None = None,
) -> RunInfo:
    """All of it at `now` (seconds since the epoch).

    Args:
        marks: from the journals: {"t", "mark": kind, "step", "text"}.
        reports: of ranks that do not go on, as in the journals.
        ranks: what is known of the ranks' processes.
    """
    phases = phases_of(record.history, record.created, view.is_active)
    return RunInfo(
        run_id=record.run_id,
        name=record.name,
        state=view.state,
        created=record.created,
        ended=record.ended,
        elapsed_s=max(0.0, (record.ended or now) - record.created),
        phase=phases[-1].name if phases else "",
        phases=phases,
        world_size=record.world_size,
        world_id=record.world_id,
        cluster=record.cluster,
        ranks=_ranks(record, view, ranks or {}),
        progress=bars(view),
        notice=notice(view),
        hang=without_advice(view.hang.text) if view.hang else "",
        latest=all_latest(view),
        marks=marks_of(record, marks, reports),
        notes=record.notes if view.metrics.progress.shown() else [*record.notes, *filter(None, [cost(view)])],
        errors=[_error(error) for error in view.errors],
        log_scales=sorted(view.log),
        layout=dict(view.layout) if view.layout is not None else None,
        artifacts=record.artifacts,
        num_left_out=view.metrics.num_left_out,
        actions=_actions(record, view),
    )


def phases_of(history: Sequence[Mapping[str, Any]], created: float, is_active: bool) -> list[Phase]:
    """The stretches of a run's life, from the changes that its record holds."""
    changes: list[tuple[float, str]] = []
    for entry in history:
        state = entry.get("state")
        name = entry.get("phase") or (PHASES.get(state, "ended") if state else "")
        if name and (not changes or changes[-1][1] != name):
            changes.append((float(entry.get("t", created)), str(name)))
    if not is_active and (not changes or changes[-1][1] != "ended"):
        changes.append((changes[-1][0] if changes else created, "ended"))
    ends = [began for began, _ in changes[1:]]
    return [
        Phase(name=name, began=began, ended=end) for (began, name), end in zip(changes, [*ends, None], strict=False)
    ]


def marks_of(record: RunRecord, marks: Sequence[Mapping[str, Any]], reports: Sequence[Mapping[str, Any]]) -> list[Mark]:
    """What to draw on a chart, in order of time; of very many, the newest."""
    found = [
        Mark(t=float(mark["t"]), kind=_kind(mark["mark"]), text=str(mark.get("text", "")), step=mark.get("step"))
        for mark in marks
        if mark.get("mark") in MARKS
    ]
    for report in reports:
        if not report.get("recovered"):
            text = without_advice(str(report.get("text", "")))
            found.append(Mark(t=float(report.get("t", 0.0)), kind="hang", text=text))
    marked = {mark.get("metric") for mark in marks}
    for name, bad in record.not_finite.items():
        if name in marked:
            continue
        first = format_step(bad["first"])
        text = f"{short_name(name)}: {bad['count']:,} values were NaN or infinite, first at step {first}"
        found.append(Mark(t=record.ended or record.created, kind="alert", text=text, step=bad["first"]))
    return sorted(found, key=lambda mark: mark.t)[-MAX_MARKS:]


def _kind(name: Any) -> Literal["checkpoint", "restart", "resize", "alert", "hang"]:
    return cast('Literal["checkpoint", "restart", "resize", "alert", "hang"]', name)


def _ranks(record: RunRecord, view: ViewState, facts: Mapping[int, RankFacts]) -> list[RankInfo]:
    shown = view.shown_ranks
    rows = []
    for rank in sorted({*record.ranks, *shown}):
        state, detail = shown.get(rank, ("starting", ""))
        known = dict(facts.get(rank, {})) if view.is_active else {}
        if known.pop("state", "") == "lost" and state == "running":
            state = "exited"
        detail = detail or known.pop("detail", "")
        known |= {"split": split_of(view, rank), "total_split": total_split_of(view, rank)}
        rows.append(RankInfo(rank=rank, state=state, detail=detail, **known))
    return rows


def _actions(record: RunRecord, view: ViewState) -> RunActions:
    spec = record.spec
    saves = bool(spec.get("checkpoint_every") or spec.get("max_restarts") or spec.get("elastic") or spec.get("resume"))
    return RunActions(
        stop=view.is_active,
        checkpoint=view.state == "running" and saves,
        serve=not view.is_active and "model" in record.artifacts,
    )


def _error(error: Mapping[str, Any]) -> RankError:
    lines = error.get("traceback") or ()
    return RankError(
        rank=int(error.get("rank", -1)),
        ename=str(error.get("ename", "")),
        evalue=str(error.get("evalue", "")),
        traceback=lines if isinstance(lines, str) else "\n".join(map(str, lines)),
    )
