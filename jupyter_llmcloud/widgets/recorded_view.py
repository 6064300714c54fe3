"""The view of a run from its folder, for whoever did not follow it."""

from __future__ import annotations

import time

from jupyter_llmcloud.core.run.end_report import own_errors
from jupyter_llmcloud.storage.run_journals import RunJournals
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from jupyter_llmcloud.system.gil import Pace
from jupyter_llmcloud.widgets.view_state import ViewState


def recorded_view(folder: RunFolder, record: RunRecord, state: str) -> ViewState:
    """What a run has logged so far; `state` is that of the run now, which the record of a lost one does not know."""
    pace = Pace()
    view = ViewState(record.run_id, record.name, state, max(0.0, (record.ended or time.time()) - record.created))
    for rank in record.ranks:
        view.set_rank(rank, *record.rank_state(rank))
    for rank, records in RunJournals(folder, record.ranks).metrics():
        for entry in records:
            view.metrics.feed(rank, [entry])
            pace.rest_when_due()
    view.errors = own_errors(record.errors) if state == "failed" else ()
    view.shares, view.seconds = folder.read_times()
    view.seconds, view.price = record.times or view.seconds, record.price
    view.log = frozenset(folder.log_scales() or ())
    if not view.is_active:
        view.end(state)
    return view
