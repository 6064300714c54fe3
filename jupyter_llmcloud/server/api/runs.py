"""Runs: read from their folders, stopped through the agent that leads them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.spec import Script
from jupyter_llmcloud.errors import LLMCloudError, UsageError
from jupyter_llmcloud.server.api.base import LLMCloudHandler, access, expect
from jupyter_llmcloud.storage import log_text
from jupyter_llmcloud.storage.journal import Cursor, Record, read_from
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from jupyter_llmcloud.widgets import static_view
from jupyter_llmcloud.widgets.recorded_view import recorded_view

if TYPE_CHECKING:
    from jupyter_llmcloud.server.api.run_starts import RunStarts
    from jupyter_llmcloud.server.api.run_states import RunStates
    from jupyter_llmcloud.storage.runs import RunStore

TAIL_BYTES = 1 << 16
MAX_RECORDS = 100_000
TEXT = "text/plain; charset=utf-8"
_SUMMARY = ("run_id", "name", "state", "created", "ended", "world_size", "ranks", "cluster", "artifacts")


def latest(folder: RunFolder, not_finite: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Progress and the last value of each metric, from the end of the first rank's journal.

    `not_finite` is that of the run's record; where the last value is one, its "value" says which: "nan", "inf", "-inf".
    """
    progress: list[float] | None = None
    values: dict[str, float] = {}
    for record in _tail(next(iter(sorted((folder.path / "metrics").glob("rank-*.jsonl"))), None)):
        progress = record.get("progress", progress)
        values.update(record.get("values") or {})
    told = {name: {**found, **_named(name, values)} for name, found in not_finite.items()}
    return {"progress": progress, "metrics": values, "not_finite": told}


def _named(name: str, values: Mapping[str, float]) -> dict[str, str]:
    value = values.get(name, 0.0)
    return {} if math.isfinite(value) else {"value": str(value)}


def _tail(path: Path | None) -> list[Record]:
    if path is None:
        return []
    start = max(0, path.stat().st_size - TAIL_BYTES)
    return read_from(path, Cursor(offset=start), TAIL_BYTES)


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


class _RunHandler(LLMCloudHandler):
    def initialize(self, runs: RunStore, run_states: RunStates, **shared: Any) -> None:  # type: ignore[override]
        super().initialize(**shared)
        self.runs = runs
        self.run_states = run_states

    async def summary(self, record: RunRecord) -> dict[str, Any]:
        """What the list of runs tells of one."""
        told = {key: getattr(record, key) for key in _SUMMARY}
        folder = self.runs.folder(record.run_id)
        state = await self.run_states.true_state(record)
        return {**told, "state": state, **await asyncio.to_thread(latest, folder, record.not_finite)}


class RunsHandler(_RunHandler):
    """All runs."""

    _starting: asyncio.Future[Any] | None = None

    def initialize(self, starts: RunStarts, **shared: Any) -> None:  # type: ignore[override]
        """`starts` are the runs that this server is about to start."""
        super().initialize(**shared)
        self.starts = starts

    @access("read")
    async def get(self) -> None:
        """List them, the newest first; `?state=active` only those that go on."""
        state = self.get_query_argument("state", "")
        if state not in ("", "active"):
            raise UsageError(f"state={state!r} is not possible: write active, or leave it out.")
        limit = self.number("limit", 100, 10_000)
        records = await asyncio.to_thread(self.runs.list)
        chosen = (record for record in records if not state or record.is_active)
        rows = await asyncio.gather(*(self.summary(record) for record in itertools.islice(chosen, limit)))
        self.answer({"runs": [row for row in rows if not state or row["state"] != "lost"]})

    @access("execute")
    async def post(self) -> None:
        """Start a run from a source text and a RunSpec, on ranks of its own. It may wait for them when this answers."""
        fields = self.fields("source", "spec", "script")
        source = expect(str, "source", fields.get("source"))
        spec = expect(dict, "spec", fields.get("spec", {}))
        script = _script(expect(dict, "script", fields.get("script", {})))
        await self.started()
        work = self._starting = asyncio.ensure_future(self.starts.start(source, spec, script))
        record, said = await self.carry_out("run.start", str(spec.get("name") or script.file)[:128], work)
        self.answer({"run_id": record.run_id, "name": record.name, "state": record.state, "notes": said}, 201)

    def on_connection_close(self) -> None:
        """Whoever asked for a run has gone before it was theirs."""
        if self._starting is not None:
            self._starting.cancel()


def _script(fields: dict[str, Any]) -> Script:
    if unknown := sorted(set(fields) - set(Script.__dataclass_fields__)):
        raise UsageError(f"script.{unknown[0]} is not known here: {', '.join(Script.__dataclass_fields__)} are.")
    arguments = expect(list, "script.arguments", fields.get("arguments", []))
    texts = {name: expect(str, f"script.{name}", fields.get(name, "")) for name in ("file", "folder")}
    return Script(arguments=[expect(str, "script.arguments", item) for item in arguments], **texts)


class RunHandler(_RunHandler):
    """One run, by its id or name."""

    @access("read")
    async def get(self, name: str) -> None:
        """Everything its record holds."""
        folder = self.runs.find(name)
        record = await asyncio.to_thread(folder.read)
        told = {**asdict(record), **await self.summary(record), "source": folder.source()}
        with contextlib.suppress(LLMCloudError):  # as its record has it, when its cluster does not answer
            told["agent"] = await self.run_states.leader_address(record)
        self.answer(told)

    @access("write")
    async def delete(self, name: str) -> None:
        """Remove a run that has ended, with everything it left."""
        work = asyncio.to_thread(self.runs.delete, name)
        self.answer({"run_id": await self.carry_out("run.delete", name, work)})


class RunRecordsHandler(_RunHandler):
    """Logs or metrics of a run."""

    @access("read")
    async def get(self, name: str, kind: str) -> None:
        """The newest records, `?rank=` of one rank, at most `?limit=`."""
        rank = self.number("rank", 0, 1_000_000) if self.get_query_argument("rank", "") else None
        limit = self.number("limit", 1000, MAX_RECORDS)
        folder = self.runs.find(name)
        self.answer({"records": await asyncio.to_thread(newest, folder, kind, rank, limit)})


class RunLogHandler(_RunHandler):
    """All that a run has written."""

    _gone: asyncio.Future[None] | None = None

    @access("read")
    async def get(self, name: str) -> None:
        """Stream it as text, `?rank=` of one rank; what ranks wrote is never taken for a page."""
        rank = self.number("rank", 0, 1_000_000) if self.get_query_argument("rank", "") else None
        folder = self.runs.find(name)
        pieces = log_text.pieces(folder, rank)
        piece = await asyncio.to_thread(next, pieces, b"")  # what goes wrong at once is an error, not half a log
        self.set_header("Content-Type", TEXT)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Disposition", f'inline; filename="{folder.run_id}.txt"')
        self._gone = asyncio.get_running_loop().create_future()
        while piece and not self._gone.done():
            self.write(piece)
            # No faster than it is read. What a reader who has gone had not taken is never flushed, and never fails.
            await asyncio.wait([self._gone, self.flush()], return_when=asyncio.FIRST_COMPLETED)
            piece = await asyncio.to_thread(next, pieces, b"")
        self.finish(set_content_type=TEXT)

    def on_connection_close(self) -> None:
        """The reader has gone."""
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)


class RunViewHandler(_RunHandler):
    """A run as it is looked at."""

    @access("read")
    async def get(self, name: str) -> None:
        """Its static form as it is now, for a page that has lost the live one."""
        folder = self.runs.find(name)
        record = await asyncio.to_thread(folder.read)
        state = await self.run_states.true_state(record)
        view = await asyncio.to_thread(recorded_view, folder, record, state)
        html = static_view.html(view, says_how_to_follow=False)
        self.answer({"run_id": record.run_id, "name": record.name, "state": state, "html": html})

    @access("write")
    async def put(self, name: str) -> None:
        """Remember which metrics are drawn in powers of ten: {"log": [names]}."""
        names = expect(list, "log", self.fields("log").get("log", []))
        metrics = [expect(str, "log", metric) for metric in names]
        folder = self.runs.find(name)
        await asyncio.to_thread(folder.set_log_scales, metrics)
        self.answer({"log": metrics})


class RunStopHandler(_RunHandler):
    """The end of a run."""

    @access("execute")
    async def post(self, name: str) -> None:
        """Ask its agent to stop it; asked again, the agent stops it harder."""
        self.fields()
        record = self.runs.find(name).read()
        if not record.is_active:
            raise UsageError(f"run {record.run_id!r} is not active, it is {record.state}.")
        self.answer({"state": await self.carry_out("run.stop", record.run_id, self.run_states.stop(record))})
