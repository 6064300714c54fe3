"""Follow a run from a terminal until it ends; Ctrl-C is Stop."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.client.stop_signal import StopSignal
from jupyter_llmcloud.client.terminal import TerminalOutput, status_of
from jupyter_llmcloud.errors import LLMCloudError, NotFound, ServerError
from jupyter_llmcloud.protocol.client import is_ready
from jupyter_llmcloud.storage.run_journals import RunJournals
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

POLL_S = 0.05
ALIVE_S = 2.0  # how often the server is asked whether the agent of a run that goes on is there
STOP_TIMEOUT_S = 10.0
FAILED, STOPPED = 1, 130
_RUNGS = (
    "Stopping after the step that all ranks are at. Ctrl-C again interrupts them at once.",
    "Interrupting the ranks. Ctrl-C again breaks the collectives they wait in.",
    "Breaking collectives. Ctrl-C again kills the ranks.",
    "Killing the ranks.",
)


class TerminalRun:
    """One run, shown from its first line on.

    Args:
        server: that knows it.
        folder: where it is recorded.
        is_ours: whether Ctrl-C stops it; else it leaves the run alone.
    """

    def __init__(self, server: ServerClient, folder: RunFolder, *, is_ours: bool = True) -> None:
        self._is_ours = is_ours
        self._server = server
        self._folder = folder
        self._said: set[str] = set()
        self._asked_at = time.monotonic()
        self._is_lost = False

    def follow(self) -> int:
        """Show it until it ends; returns the exit status that stands for how it ended."""
        record = self._record()
        terminal = TerminalOutput(record.name, (), record.created)
        journals: RunJournals | None = None
        with self._told_when_unread(), StopSignal() as stop:
            while True:
                record = self._record()
                ended = self._has_ended(record)
                if journals is None and record.ranks:
                    terminal = TerminalOutput(record.name, record.ranks, record.created)
                    journals = RunJournals(self._folder, record.ranks)
                self._show(record, terminal, journals)
                if ended:
                    break
                if stop.presses and not self._is_ours:
                    return self._detach(terminal)
                self._pass_on(stop, terminal)
                is_ready([stop.fd], select.POLLIN, POLL_S)
                stop.drain()
        return self._end(record, terminal)

    @contextmanager
    def _told_when_unread(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            words = f"Nobody reads on. The run goes on: jupyter llmcloud runs attach {self._folder.run_id}"
            print(words, file=sys.stderr, flush=True)
            raise

    def _record(self) -> RunRecord:
        try:
            return self._folder.read()
        except NotFound:
            raise ServerError(
                f"the run's folder {self._folder.path} cannot be read on this machine. "
                f"The run goes on: jupyter llmcloud runs logs {self._folder.run_id}"
            ) from None

    def _has_ended(self, record: RunRecord) -> bool:
        if record.is_active and time.monotonic() > self._asked_at + ALIVE_S:
            self._asked_at = time.monotonic()
            try:
                told = self._server.ask("GET", f"runs/{record.run_id}", timeout_s=ALIVE_S)
                self._is_lost = told["state"] == "lost"
            except LLMCloudError:
                pass  # the server is being started again: the next time
        return self._is_lost or not record.is_active

    def _show(self, record: RunRecord, terminal: TerminalOutput, journals: RunJournals | None) -> None:
        is_starting = record.state == "queued" and not record.ranks and not self._said
        terminal.state = "starting" if is_starting else record.state
        for entry in record.history:
            if (why := entry.get("why")) and why not in self._said:
                self._said.add(why)
                terminal.say(f"{record.name}: {why}")
        if journals is not None:
            journals.follow(record.ranks)
            for rank, records in journals.metrics():
                terminal.metrics(rank, records)
            for rank in record.ranks:
                if record.rank_state(rank)[0] == "failed":
                    terminal.rank_has_gone(rank)
            terminal.logs(journals.logs())
            if record.price:
                seconds = sum(sum(parts.values()) for parts in self._folder.read_times()[1].values())
                terminal.spent = record.price, seconds, len(record.ranks)
        terminal.tick()

    def _pass_on(self, stop: StopSignal, terminal: TerminalOutput) -> None:
        while stop.passed_on < stop.presses:
            terminal.say(_RUNGS[min(stop.passed_on, len(_RUNGS) - 1)])
            stop.passed_on += 1
            try:
                self._server.stop_run(self._folder.run_id, STOP_TIMEOUT_S)
            except LLMCloudError as error:
                if self._record().is_active:
                    terminal.say(str(error))

    def _detach(self, terminal: TerminalOutput) -> int:
        terminal.detach()
        terminal.say(f"Detached. The run goes on: jupyter llmcloud runs attach {self._folder.run_id}")
        return STOPPED

    def _end(self, record: RunRecord, terminal: TerminalOutput) -> int:
        state = "lost" if self._is_lost else record.state
        terminal.finish(state, record.errors)
        took = f" after {record.ended - record.created:.1f} s" if record.ended else ""
        for alarm in terminal.alarms:
            terminal.say(f"⚠ {alarm}")
        terminal.say(f"{record.run_id} {state}{took}: {self._folder.path}")
        return exit_status(state, record)


def exit_status(state: str, record: RunRecord) -> int:
    """0 when it has finished, 130 when it was stopped, else 1, or the status with which the script left."""
    if state in ("finished", "stopped"):
        return 0 if state == "finished" else STOPPED
    error = record.errors[0] if record.errors else {}
    status = status_of(str(error.get("evalue", ""))) if error.get("ename") == "SystemExit" else None
    return status or FAILED
