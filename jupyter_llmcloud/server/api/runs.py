"""Runs: read from their folders, stopped through the agent that leads them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from jupyter_llmcloud.core.scheduling.holders import holder, sweep_of
from jupyter_llmcloud.core.spec import Script
from jupyter_llmcloud.errors import LLMCloudError, UsageError
from jupyter_llmcloud.protocol.http.runs import (
    CheckpointSaved,
    LogQuery,
    LogRecord,
    LogRecords,
    LogScales,
    LogScalesKept,
    MetricRecord,
    MetricRecords,
    RecordsQuery,
    Run,
    RunDeleted,
    RunDetail,
    RunHang,
    Runs,
    RunsQuery,
    RunStarted,
    RunStopped,
    RunView,
    StartRun,
)
from jupyter_llmcloud.protocol.http.series import SeriesQuery, SeriesWindow
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.operation import NoFields, operation
from jupyter_llmcloud.storage import log_text
from jupyter_llmcloud.storage.journal import Record, read_last
from jupyter_llmcloud.storage.layouts import Layouts
from jupyter_llmcloud.storage.runs import ACTIVE_STATES, RunFolder, RunRecord
from jupyter_llmcloud.storage.search.sweeps import SweepStore
from jupyter_llmcloud.widgets import static_view
from jupyter_llmcloud.widgets.recorded_view import recorded_view
from jupyter_llmcloud.widgets.view_state import without_advice

if TYPE_CHECKING:
    from jupyter_llmcloud.server.api.run_starts import RunStarts
    from jupyter_llmcloud.server.api.run_states import RunStates
    from jupyter_llmcloud.server.watches.series_windows import SeriesWindows
    from jupyter_llmcloud.storage.runs import RunStore

TAIL_BYTES = 1 << 16
TEXT = "text/plain"
_SUMMARY = (
    "run_id", "name", "created", "ended", "world_size", "ranks", "cluster", "artifacts", "world_id", "num_restarts",
    "num_resizes",
)  # fmt: skip


def latest(folder: RunFolder, record: RunRecord) -> dict[str, Any]:
    """Progress and the last value of each metric, from the end of the first rank's journal, and the cost.

    Where the last value is not finite, the "value" of `not_finite` says which it is: "nan", "inf", "-inf".
    """
    progress, values = None, dict[str, float]()
    if (journal := min((folder.path / "metrics").glob("rank-*.jsonl"), default=None)) is not None:
        with contextlib.suppress(FileNotFoundError):  # somebody removes the run
            file = journal.stat()
            progress, known = _last(journal, file.st_size, file.st_mtime_ns)
            values |= known
    told = {name: {**found, **_named(name, values)} for name, found in record.not_finite.items()}
    figures = {"progress": progress, "metrics": values, "not_finite": told}
    return figures | ({"cost": record.cost(record.times or folder.read_times()[1])} if record.price else {})


def as_run(record: RunRecord, state: str, figures: Mapping[str, Any]) -> Run:
    """A run as a list tells of it; `state` is that of now, `figures` are those of `latest`."""
    kept = {key: getattr(record, key) for key in _SUMMARY}
    hang = _hang(record.hang) if record.hang and state in ACTIVE_STATES else None
    phases = [str(entry["phase"]) for entry in record.history if "phase" in entry]
    return Run(
        **kept,
        state=state,
        holder=holder(record.owner) if record.owner else "",
        sweep=sweep_of(record.owner),
        phase=phases[-1] if phases and state == "queued" else "",
        hang=hang,
        **figures,
    )


def _hang(report: Mapping[str, Any]) -> RunHang:
    return RunHang(
        t=report.get("t", 0.0),
        text=without_advice(str(report.get("text", ""))),
        late=report.get("late", []),
        waiting=report.get("waiting", []),
    )


def _named(name: str, values: Mapping[str, float]) -> dict[str, str]:
    value = values.get(name, 0.0)
    return {} if math.isfinite(value) else {"value": str(value)}


@functools.lru_cache(maxsize=4096)  # lists are asked for again and again, and most journals have not grown
def _last(journal: Path, size: int, changed_ns: int) -> tuple[list[float] | None, dict[str, float]]:
    """Progress and the last value of each metric, of a journal that was last written so."""
    progress: list[float] | None = None
    values: dict[str, float] = {}
    for row in read_last(journal, TAIL_BYTES):
        progress = row.get("progress", progress)
        values.update(row.get("values") or {})
    return progress, values


def newest(folder: RunFolder, kind: str, rank: int | None, limit: int) -> list[dict[str, Any]]:
    """The newest records of a kind ("logs" or "metrics"), in order of time."""
    rows = (row for row in folder.records(kind) if rank is None or row[0] == rank)
    return [{"rank": number, **record, **_not_finite(record)} for number, record in deque(rows, maxlen=limit)]


def _not_finite(record: Record) -> dict[str, Any]:
    """What JSON has no number for, so that its value is null: {"not_finite": {"loss": "nan"}}."""
    values = record.get("values") or {}
    found = {
        name: str(value) for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)
    }
    return {"not_finite": found} if found else {}


class StoredRunsHandler(LLMCloudHandler):
    """Base of what answers of recorded runs."""

    def initialize(self, runs: RunStore, run_states: RunStates, **shared: Any) -> None:  # type: ignore[override]
        """`runs` are those on disk, `run_states` asks their agents."""
        super().initialize(**shared)
        self.runs = runs
        self.run_states = run_states

    async def summary(self, record: RunRecord) -> Run:
        """What the list of runs tells of one."""
        folder = self.runs.folder(record.run_id)
        state = await self.run_states.true_state(record)
        return as_run(record, state, await asyncio.to_thread(latest, folder, record))


class RunsHandler(StoredRunsHandler):
    """All runs."""

    _starting: asyncio.Future[Any] | None = None

    def initialize(self, starts: RunStarts, **shared: Any) -> None:  # type: ignore[override]
        """`starts` are the runs that this server is about to start."""
        super().initialize(**shared)
        self.starts = starts

    @operation("read", Runs, query=RunsQuery)
    async def get(self, query: RunsQuery) -> Runs:
        """List runs, the newest first; `state=active` only those that go on, `trials=none` without those of sweeps."""
        records = await asyncio.to_thread(self._without_trials if query.trials else self.runs.list)
        chosen = (record for record in records if query.state is None or record.is_active)
        rows = await asyncio.gather(*(self.summary(record) for record in itertools.islice(chosen, query.limit)))
        return Runs(runs=[row for row in rows if query.state is None or row.state != "lost"])

    def _without_trials(self) -> list[RunRecord]:
        """Those of a sweep that was deleted are runs like others."""
        sweeps = SweepStore(self.runs.path.parent).names()
        return [record for record in self.runs.list() if sweep_of(record.owner) not in sweeps]

    @operation("execute", RunStarted, 201, body=StartRun)
    async def post(self, body: StartRun) -> RunStarted:
        """Start a run from a source text and a RunSpec, on ranks of its own. It may wait for them when this answers."""
        given, script = body.spec.given(), Script(**msgspec.structs.asdict(body.script))
        await self.started()
        work = self._starting = asyncio.ensure_future(self.starts.start(body.source, given, script))
        record, said = await self.carry_out("run.start", str(given.get("name") or script.file)[:128], work)
        return RunStarted(run_id=record.run_id, name=record.name, state=record.state, notes=said)

    def on_connection_close(self) -> None:
        """Whoever asked for a run has gone before it was theirs."""
        if self._starting is not None:
            self._starting.cancel()


class RunHandler(StoredRunsHandler):
    """One run, by its id or name."""

    @operation("read", RunDetail)
    async def get(self, name: str) -> RunDetail:
        """Everything that the record of a run holds, by its id or name."""
        folder = self.runs.find(name)
        record = await asyncio.to_thread(folder.read)
        kept = {name: value for name, value in asdict(record).items() if name != "starter"}
        told = {**kept, **msgspec.structs.asdict(await self.summary(record)), "source": folder.source()}
        with contextlib.suppress(LLMCloudError):  # as its record has it, when its cluster does not answer
            told["agent"] = await self.run_states.leader_address(record)
        return RunDetail(**told)

    @operation("write", RunDeleted)
    async def delete(self, name: str) -> RunDeleted:
        """Remove a run that has ended, with everything it left."""
        work = asyncio.to_thread(self.runs.delete, name)
        return RunDeleted(run_id=await self.carry_out("run.delete", name, work))


class RunLogsHandler(StoredRunsHandler):
    """What the ranks of a run wrote, record by record."""

    @operation("read", LogRecords, query=RecordsQuery)
    async def get(self, name: str, query: RecordsQuery) -> LogRecords:
        """The newest log records of a run, of one rank if one is named."""
        rows = await asyncio.to_thread(newest, self.runs.find(name), "logs", query.rank, query.limit)
        return LogRecords(records=cast(list[LogRecord], rows))


class RunMetricsHandler(StoredRunsHandler):
    """What the ranks of a run measured, record by record."""

    @operation("read", MetricRecords, query=RecordsQuery)
    async def get(self, name: str, query: RecordsQuery) -> MetricRecords:
        """The newest metric records of a run, of one rank if one is named."""
        rows = await asyncio.to_thread(newest, self.runs.find(name), "metrics", query.rank, query.limit)
        return MetricRecords(records=cast(list[MetricRecord], rows))


class RunLogHandler(StoredRunsHandler):
    """All that a run has written."""

    _gone: asyncio.Future[None] | None = None

    @operation("read", TEXT, query=LogQuery)
    async def get(self, name: str, query: LogQuery) -> None:
        """All that a run has written, as text, of one rank if one is named; it is never taken for a page."""
        folder = self.runs.find(name)
        pieces = log_text.pieces(folder, query.rank)
        piece = await asyncio.to_thread(next, pieces, b"")  # what goes wrong at once is an error, not half a log
        self.set_header("Content-Type", f"{TEXT}; charset=utf-8")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Disposition", f'inline; filename="{folder.run_id}.txt"')
        self._gone = asyncio.get_running_loop().create_future()
        while piece and not self._gone.done():
            self.write(piece)
            # No faster than it is read. What a reader who has gone had not taken is never flushed, and never fails.
            await asyncio.wait([self._gone, self.flush()], return_when=asyncio.FIRST_COMPLETED)
            piece = await asyncio.to_thread(next, pieces, b"")
        self.finish(set_content_type=f"{TEXT}; charset=utf-8")

    def on_connection_close(self) -> None:
        """The reader has gone."""
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)


class RunViewHandler(StoredRunsHandler):
    """A run as it is looked at."""

    @operation("read", RunView)
    async def get(self, name: str) -> RunView:
        """The static form of a run as it is now, for a page that has lost the live one."""
        folder = self.runs.find(name)
        record = await asyncio.to_thread(folder.read)
        state = await self.run_states.true_state(record)
        view = await asyncio.to_thread(recorded_view, folder, record, state)
        html = static_view.html(view, says_how_to_follow=False)
        return RunView(run_id=record.run_id, name=record.name, state=state, html=html)

    @operation("write", LogScalesKept, body=LogScales)
    async def put(self, name: str, body: LogScales) -> LogScalesKept:
        """Remember which metrics of a run are drawn in powers of ten, and the layout of charts for runs of its name."""
        folder = self.runs.find(name)
        await asyncio.to_thread(folder.set_log_scales, body.log)
        if isinstance(body.layout, dict):
            record = await asyncio.to_thread(folder.read)
            await asyncio.to_thread(Layouts(self.runs.path.parent).pin, record.name, body.layout)
        return LogScalesKept(log=body.log)


class RunCheckpointHandler(StoredRunsHandler):
    """A checkpoint, out of turn."""

    @operation("execute", CheckpointSaved, body=NoFields)
    async def post(self, name: str, body: NoFields) -> CheckpointSaved:
        """Have a run save a checkpoint of its next step, and wait until it is complete; the run goes on."""
        record = self.runs.find(name).read()
        if record.state != "running":
            raise UsageError(f"run {record.run_id!r} is not running, it is {record.state}.")
        step = await self.carry_out("run.checkpoint", record.run_id, self.run_states.save(record))
        return CheckpointSaved(run_id=record.run_id, step=step)


class RunSeriesHandler(StoredRunsHandler):
    """A metric of a run, from near."""

    def initialize(self, series: SeriesWindows, **shared: Any) -> None:  # type: ignore[override]
        """`series` keeps what was asked for last."""
        super().initialize(**shared)
        self.series = series

    @operation("read", SeriesWindow, query=SeriesQuery)
    async def get(self, name: str, query: SeriesQuery) -> SeriesWindow:
        """A stretch of a metric over the ranks, or of each rank: exact values where they are few, else columns."""
        return await self.series.window(self.runs.find(name), query)


class RunStopHandler(StoredRunsHandler):
    """The end of a run."""

    @operation("execute", RunStopped, body=NoFields)
    async def post(self, name: str, body: NoFields) -> RunStopped:
        """Ask the agent of a run to stop it; asked again, the agent stops it harder."""
        record = self.runs.find(name).read()
        if not record.is_active:
            raise UsageError(f"run {record.run_id!r} is not active, it is {record.state}.")
        return RunStopped(state=await self.carry_out("run.stop", record.run_id, self.run_states.stop(record)))
