"""The live view of a run that goes on beside the notebook, kept up to date by a thread of its own."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from jupyter_llmcloud.core.run.end_report import own_errors
from jupyter_llmcloud.storage.run_journals import RunJournals
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from jupyter_llmcloud.system.gil import Pace, short_switch_intervals
from jupyter_llmcloud.widgets.front_end import FrontEnd
from jupyter_llmcloud.widgets.live_view import LiveView

POLL_S = 0.2


class ShownRun(Protocol):
    """What a card needs to know of its run."""

    run_id: str
    folder: RunFolder

    @property
    def record(self) -> RunRecord:
        """Its record as it is now."""

    @property
    def state(self) -> str:
        """Of the run, which may be lost."""

    def done(self) -> bool:
        """Whether it has ended."""

    def cancel(self) -> bool:
        """Press Stop."""


class RunCard:
    """Of one run.

    Args:
        front_end: where it is shown; it must take widgets.
    """

    def __init__(self, run: ShownRun, front_end: FrontEnd) -> None:
        self._run = run
        self._record = record = run.record
        self._journals: RunJournals | None = None
        started = record.created or None
        self._view = LiveView(run.run_id, record.name, record.ranks, self._stop, started=started, front_end=front_end)

    def _stop(self) -> None:
        self._run.cancel()

    def show(self) -> None:
        """Below the cell that is executed, and from then on."""
        self._take_states(self._record)
        self._view.show()
        threading.Thread(target=self._follow, name=f"llmcloud-card-{self._run.run_id}", daemon=True).start()

    def _follow(self) -> None:
        pace = Pace()
        while not self._look(pace):
            time.sleep(POLL_S)
        state, record = self._run.state, self._run.record
        errors = own_errors(record.errors) if state == "failed" else []
        self._view.finish(state, record.ended or time.time(), errors=errors, report=record.notes)

    def _look(self, pace: Pace) -> bool:
        """Take in what is new and show it; returns whether that was all."""
        # The kernel's answer to a cell takes a dozen turns of the interpreter: each would wait for 5 ms.
        with short_switch_intervals():
            is_over = self._read(pace)
            if not is_over:
                self._view.refresh(time.time())
        return is_over

    def _read(self, pace: Pace) -> bool:
        """Take in what is new; returns whether that was all."""
        ended = self._run.done()
        record = self._run.record
        self._take_states(record)
        if record.ranks and self._journals is None:
            self._journals = RunJournals(self._run.folder, record.ranks)
        if self._journals is not None:
            self._journals.follow(record.ranks)
            for rank, records in self._journals.metrics():
                self._view.handle_metrics(rank, records)
                pace.rest_when_due()
            for _, entry in self._journals.logs():
                pace.rest_when_due()
                if entry["kind"] == "report":
                    self._view.handle_report(entry)
        return ended

    def _take_states(self, record: RunRecord) -> None:
        shown = self._view.state
        shown.name = record.name
        for rank in record.ranks:
            if shown.ranks.get(rank) != (state := record.rank_state(rank)):
                self._view.handle_rank_state(rank, *state)  # the first one that runs ends the waiting of all
        if record.state != shown.state:
            self._view.handle_state(record.state)
