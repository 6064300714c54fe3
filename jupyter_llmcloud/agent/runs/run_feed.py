"""What a run leaves behind and what it tells: its record and journals, and the same to those who follow it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from jupyter_llmcloud.agent.runs.alert_log import AlertActions, AlertLog
from jupyter_llmcloud.agent.runs.time_log import TimeLog
from jupyter_llmcloud.agent.runs.writer import RunWriter
from jupyter_llmcloud.agent.trackers.process import TrackerProcesses
from jupyter_llmcloud.core.detect.detector import Alert
from jupyter_llmcloud.core.metrics.not_finite import NotFiniteLog
from jupyter_llmcloud.core.names import name_ranks, short_name
from jupyter_llmcloud.core.output.numerals import format_step
from jupyter_llmcloud.core.run.end_report import describe_saved
from jupyter_llmcloud.protocol.agent_messages import Journaled, RankState, TimesTold
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rank_messages import RankTimes
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, Times, root_url_of
from jupyter_llmcloud.system.alert_sinks import alert_sender

RECORD_AFTER_S = 0.05
NOT_FINITE_AFTER_S = 1.0  # how soon a loss that is NaN is in the record; its count is brought up to date at the end


class RunFeed:
    """The records of one run on its leading agent, written and passed on to who follows the run.

    Args:
        record: its `run.json` so far.
        source: the notebook cell.
        running: the ranks that execute the run now.
        actions: what alerts can have done with the run.
    """

    def __init__(
        self,
        record: RunRecord,
        folder: RunFolder,
        source: str,
        running: Callable[[], Iterable[int]] = tuple,
        actions: AlertActions | None = None,
    ) -> None:
        self.record = record
        self._folder = folder
        self._followers: set[Connection] = set()
        self._running = running
        self._files = RunWriter(folder, record, source, self.note)
        self._late: asyncio.TimerHandle | None = None  # when a record that is held back is written
        self._not_finite = NotFiniteLog(record.not_finite)
        self._told_not_finite = set(record.not_finite)  # metrics
        earlier = folder.read_times()[1] if record.state != "queued" else {}  # which another leader has counted
        self._times = TimeLog(earlier, self._tell_times)
        chosen = record.spec.get("watch") or ""
        self._alerts = AlertLog(chosen, folder.path, self._tell_alert, actions or AlertActions(), record.left_out)
        self._trackers: TrackerProcesses | None = None
        self._due: asyncio.TimerHandle | None = None  # when what was not finite is written

    def begin(self, *, at_once: bool) -> None:
        """The run has begun.

        The record is written with the first output or a moment later: a short quiet cell has ended by then and its
        record is written once.
        """
        self.change("running")
        self._late = asyncio.get_running_loop().call_later(RECORD_AFTER_S, self._tell_begun)
        if at_once:  # others look for it there
            self._tell_begun()

    def _tell_begun(self) -> None:
        if self._late is None:
            return
        self._late.cancel()
        self._late = None
        self._files.create()
        for rank in self._running():
            self.tell_state(rank, "running")

    def change(self, state: str) -> None:
        """Another state of the run."""
        self.record.state = state
        self.record.history.append({"t": round(time.time(), 3), "state": state})

    def write_record(self) -> None:
        """Write the record as it is now."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self.record.not_finite = self._not_finite.summary()
        if self._late is not None:
            self._tell_begun()
        else:
            self._files.write_record()

    def note(self, text: str) -> None:
        """A word for who follows the run, and for its record."""
        self.remember(text)
        self.tell_state(-1, "note", text)

    def note_saved(self) -> None:
        """Say what --save has saved, if anything."""
        for folder in self.record.artifacts.values():
            size = sum(file.stat().st_size for file in (self._folder.path / folder).rglob("*") if file.is_file())
            self.note(describe_saved(self.record.spec.get("save") or [folder], size, self.record.name))

    @property
    def good_step(self) -> int | None:
        """Optimizer steps after which nothing was wrong, of a run that may be rolled back to there."""
        return self._alerts.good_step

    def remember(self, why: str) -> None:
        """A word for its record alone."""
        self.record.history.append({"t": round(time.time(), 3), "why": why})

    def mark(self, kind: str, step: int | None, text: str) -> None:
        """Something that charts show beside the metrics: a checkpoint, a restart, a resize, an alert."""
        self._tell_begun()
        where = {} if step is None else {"step": step}
        self._files.mark({"mark": kind, **where, "text": text})

    def journal(self, kind: str, rank: int, records: list[dict[str, Any]]) -> None:
        """Write records of a rank, then ring at the followers."""
        self._tell_begun()
        if kind == "metrics" and self._not_finite.take(rank, records):
            self._note_not_finite()
        written = self._files.append(kind, rank, records)
        if kind == "metrics":
            self._alerts.metrics(rank, records)
        if kind == "logs" and (reports := [record for record in written if record.get("kind") == "report"]):
            self._note_hang(reports[-1])
        for said in [record["alert"] for record in records if kind == "logs" and "alert" in record]:
            self._alerts.said(said)
        self.tell(Journaled(run_id=self.record.run_id, rank=rank, journal=kind, records=written))

    def _note_hang(self, report: dict[str, Any]) -> None:
        """The ranks do not go on, or do again: the list of runs says so."""
        told: dict[str, Any] = {key: value for key, value in report.items() if key in ("t", "text", "late", "waiting")}
        self.record.hang = {} if report.get("recovered") else told
        if self.record.hang:
            self._alerts.hang(report)
        self.write_record()

    def diagnose(self) -> list[str]:
        """The run has ended: say why it failed, as far as anything tells and the cell has not said it all."""
        if self.record.state == "finished":
            self.record.hang = {}
            return []
        # Not before a run fails: what it knows of causes is more than all else that an agent keeps of a run.
        from jupyter_llmcloud.storage.recorded.diagnosis import as_record, diagnosis_of

        found = diagnosis_of(self._folder, self.record, self.record.hang)
        self.record.hang, self.record.diagnosis = {}, as_record(found)
        if found is not None:
            self._send("run-failed", f"it has failed: {found.sentence}", action=found.action)
        return [] if found is None or found.is_told else [f"Why: {found.sentence}", f"Try: {found.action}"]

    def begin_attempt(self, number: int, ranks: Iterable[int]) -> None:
        """The cell is sent to these ranks."""
        self._end_hang(list(ranks))
        self._times.begin(number, ranks)
        if self._trackers is None:
            names, url = self.record.spec.get("track") or (), root_url_of(self._folder.root)
            if names:
                self._tell_begun()
            self._trackers = TrackerProcesses(self._folder.path, names, self._note_late, url)
        self._alerts.begin_attempt()

    def _end_hang(self, ranks: list[int]) -> None:
        """Nobody hears of an attempt that is over any more: not that its ranks go on, either."""
        if not self.record.hang or not ranks:
            return
        late = self.record.hang.get("late") or self.record.hang.get("waiting") or ranks
        who = [rank for rank in late if rank in ranks] or ranks
        text = f"{name_ranks(who)} {'begins' if len(who) == 1 else 'begin'} again.\n"
        self.journal("logs", who[0], [{"kind": "report", "text": text, "late": who, "waiting": [], "recovered": True}])

    def _note_late(self, text: str) -> None:
        """A word of trackers and sinks, also after the end: in the record, unless the run is led elsewhere now."""
        if self.record.is_active:
            self.note(text)
        elif self._folder.exists:
            self.remember(text)
            self._files.write_record()

    def spent(self, rank: int, times: RankTimes, *, is_last: bool = False) -> None:
        """What a rank says of where its time goes; `is_last`: of all its time in this attempt."""
        self._times.heard(rank, times, is_last=is_last)

    def memory(self, rank: int, host: tuple[int, int], device: tuple[int, int]) -> None:
        """How much memory a rank has, and how much it can still have, in bytes: of its host and of its GPU."""
        self._alerts.memory(rank, host, device)

    def left(self, rank: int) -> None:
        """A rank has gone, and the others go on without it."""
        self._alerts.left(rank)

    @property
    def seconds(self) -> Times:
        """Where the time of the ranks has gone so far, by rank and part."""
        return self._times.seconds()

    def _tell_times(self, shares: Times, seconds: Times) -> None:
        if self.record.is_active and self._late is None:
            self._files.write_times(shares, seconds)
            self._alerts.shares(shares)
            told = TimesTold(run_id=self.record.run_id, shares=shares, seconds=seconds, price=self.record.price)
            self.tell(told, hurry=False)

    def _note_not_finite(self) -> None:
        known, found = self.record.not_finite, self._not_finite.summary()
        for name, new in found.items():
            if name not in self._told_not_finite and not self._not_finite.is_expected(name):
                self._told_not_finite.add(name)
                text = f"{short_name(name)} is {self._not_finite.word(name)} at step {format_step(new['first'])}"
                self._alerts.not_finite(name, text, new["first"])
        is_news = any(name not in known or known[name]["since"] != new["since"] for name, new in found.items())
        self.record.not_finite = found
        if is_news and self._due is None:
            self._due = asyncio.get_running_loop().call_later(NOT_FINITE_AFTER_S, self.write_record)

    def _tell_alert(self, alert: Alert, *, is_shown: bool) -> None:
        where = {} if alert.step is None else {"step": alert.step}
        about = {"metric": alert.metric} if alert.metric else {}
        seen = {"detector": alert.detector, "evidence": alert.evidence, "ranks": list(alert.ranks)}
        self._files.mark({"mark": "alert", **where, "text": alert.text, **about, **seen})
        self.record.alerts[alert.detector] = self.record.alerts.get(alert.detector, 0) + 1
        self._send(alert.detector, alert.text, **where, **about, evidence=alert.evidence, ranks=list(alert.ranks))
        if is_shown:
            self.note(f"{alert.detector}: {alert.text}.")

    def _send(self, detector: str, text: str, **seen: Any) -> None:
        """Tell the sinks outside this product of an alert."""
        name, loop = self.record.name or self.record.run_id, asyncio.get_running_loop()

        def failed(problem: str) -> None:
            with contextlib.suppress(RuntimeError):  # the agent has ended meanwhile
                loop.call_soon_threadsafe(self._note_late, problem)

        about = {"run": name, "run_id": self.record.run_id, "owner": self.record.owner, "t": round(time.time(), 3)}
        alert = {"text": f"run {name}: {detector}: {text}", "detector": detector, **about, **seen}
        try:
            alert_sender().send(alert, failed)
        except ValueError as error:
            if (problem := f"alerts are told in the run alone: {error}") not in self.record.notes:
                self.note(problem)

    def tell_state(self, rank: int, state: str, detail: str = "", *, hurry: bool = True) -> None:
        """Tell those who follow of the state of a rank."""
        self.tell(RankState(run_id=self.record.run_id, rank=rank, state=state, detail=detail), hurry=hurry)

    def tell(self, message: Message, *, hurry: bool = True) -> None:
        """Send to everybody who follows this run."""
        for follower in list(self._followers):
            follower.send(message, hurry=hurry)
            if follower.closed:
                self._followers.discard(follower)

    def flush(self) -> None:
        """Have what was told on its way now."""
        for follower in list(self._followers):
            follower.flush()

    def follow(self, connection: Connection) -> None:
        """Tell this connection what happens from now on."""
        self._followers.add(connection)

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        self._followers.discard(connection)

    def cut_off(self) -> None:
        """Those who follow find the run again where it is led from now on."""
        self._times.close()
        if self._trackers is not None:
            self._trackers.close()
        if self._due is not None:
            self._due.cancel()
        for follower in self._followers:
            follower.close()

    def close(self) -> None:
        """The run has ended."""
        self._times.close()
        if self._trackers is not None:
            self._trackers.close()
        if self._due is not None:
            self._due.cancel()
        self._files.close()
