"""A run that is watched: its folder is read by cursors, once for all who watch it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.metrics.series import MetricCollector
from jupyter_llmcloud.core.run.end_report import own_errors
from jupyter_llmcloud.errors import LLMCloudError, NotFound
from jupyter_llmcloud.server.watches.output_tail import OutputTail
from jupyter_llmcloud.storage.journal import Cursor, read_from
from jupyter_llmcloud.storage.layouts import Layouts
from jupyter_llmcloud.storage.notable import notable
from jupyter_llmcloud.system.gil import with_short_intervals
from jupyter_llmcloud.widgets.view_state import Hang, ViewState

if TYPE_CHECKING:
    from pathlib import Path

    from jupyter_llmcloud.server.api.run_states import RunStates
    from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, Times

EVERY_S = 0.05
REST = 4.0  # times what a look has taken, at the least until the next one: a thousand ranks have two thousand journals
ENDED_EVERY_S = 1.0  # somebody may delete it, or resume it
STATES_S = 3.0
NOTE_S = 4.0  # how often it is noted that the run is watched
TICK_S = 1.0  # what is said of an active run changes with time alone
PASS_BYTES = 1 << 20  # of each journal, before those who watch are told
TAIL_BYTES = 2 << 20  # of each rank's output, for who begins to watch
MAX_METRICS = 400


@dataclass
class Happened:
    """What happened to a run, in order of time, as its journals tell.

    Attributes:
        marks: checkpoints, restarts.
        reports: of ranks that did not go on.
    """

    marks: list[dict[str, Any]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)


class Listeners:
    """Whoever is to be called when there is something new.

    Attributes:
        num_calls: how often there was.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._all: set[Callable[[], None]] = set()

    def add(self, listener: Callable[[], None]) -> None:
        """One more."""
        self._all.add(listener)

    def discard(self, listener: Callable[[], None]) -> None:
        """One less."""
        self._all.discard(listener)

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._all)

    def call(self) -> None:
        """There is something new."""
        self.num_calls += 1
        for listener in list(self._all):
            listener()


class RunFollower:
    """One run.

    Args:
        folder: of the run.
        states: tells whether it truly goes on.

    Attributes:
        record: as it was read last; None before, and when there is no such run.
        view: its metrics and what is said of it.
        output: what its ranks wrote.
        happened: what was marked on the way.
        is_complete: whether everything that is there has been read once.
        is_gone: whether there is no such run, or no more.
        guard: held by whoever reads or changes the metrics.
    """

    def __init__(self, folder: RunFolder, states: RunStates) -> None:
        self.folder = folder
        self.record: RunRecord | None = None
        self.view = ViewState(folder.run_id, folder.run_id, metrics=MetricCollector(max_metrics=MAX_METRICS))
        self.output = OutputTail()
        self.happened = Happened()
        self.is_complete = False
        self.is_gone = False
        self.guard = asyncio.Lock()
        self._states = states
        self._journals = _Journals(folder)
        self._listeners = Listeners()
        self._task: asyncio.Task[None] | None = None

    def listen(self, listener: Callable[[], None]) -> None:
        """Have this called when there is something new; the first listener begins the reading."""
        self._listeners.add(listener)
        if self._task is None:
            self._task = asyncio.ensure_future(self._follow())

    def unlisten(self, listener: Callable[[], None]) -> bool:
        """No more; returns whether nobody listens now."""
        self._listeners.discard(listener)
        if not self._listeners.any:
            self.stop()
        return not self._listeners.any

    def stop(self) -> None:
        """Read it no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    @property
    def num_changes(self) -> int:
        """How often there was something new."""
        return self._listeners.num_calls

    # --- reading ---

    async def _follow(self) -> None:
        asked_at, told_at, noted_at = -STATES_S, 0.0, -NOTE_S
        while not self.is_gone:
            began = time.monotonic()
            async with self.guard:
                is_news, has_more = await asyncio.to_thread(with_short_intervals, self._read)
            took_s = time.monotonic() - began
            if self.record is not None and time.monotonic() - asked_at >= STATES_S and self.record.is_active:
                asked_at = time.monotonic()
                is_news |= await self._ask_state(self.record)
            if time.monotonic() - noted_at >= NOTE_S and self.view.is_active and not self.is_gone:
                noted_at = time.monotonic()
                await asyncio.to_thread(self.folder.note_watched)
            if is_news or (time.monotonic() - told_at >= TICK_S and self.view.is_active):
                told_at = time.monotonic()
                self._listeners.call()
            if not has_more:
                is_over = self.record is not None and not self.view.is_active and self.is_complete
                rest_s = max(EVERY_S, REST * took_s)
                await asyncio.sleep(ENDED_EVERY_S if is_over else rest_s)
        self._listeners.call()

    async def _ask_state(self, record: RunRecord) -> bool:
        """Whether it turns out that nobody leads it any more, or that somebody does who was not reached for a while."""
        try:
            state = await self._states.true_state(record)
        except (LLMCloudError, OSError, sqlite3.Error):  # it cannot be told now: there is a next time
            return False
        if state == self.view.state:
            return False
        async with self.guard:
            self._set_state(record, state)
        return True

    def _read(self) -> tuple[bool, bool]:
        """One pass; returns whether there was anything new, and whether there is more to read at once."""
        try:
            return self._read_all()
        except NotFound:
            self.is_gone = True
            return True, False
        except OSError:  # of a disk, or a process with too many open files: there is a next time
            return False, False

    def _read_all(self) -> tuple[bool, bool]:
        is_news = self._read_record()
        assert self.record is not None
        if not self.is_complete and self.output.num_taken == 0:
            self.happened.reports += [record for _, record in notable(self.folder) if record.get("kind") == "report"]
            self.output.skip(self._journals.skip_output(self.record.ranks))
        found, has_more = self._read_metrics(self.record.ranks)
        rows, more_output = self._journals.output(self.record.ranks)
        self._take_output(rows)
        if (times := self._journals.times()) is not None:
            self.view.shares, self.view.seconds = times
            self.view.price = self.record.price
            is_news = True
        marks = self._journals.marks()
        self.happened.marks += marks
        first_time = not self.is_complete and not (has_more or more_output)
        self.is_complete |= first_time
        return is_news or found or bool(rows or marks) or first_time, has_more or more_output

    def _read_record(self) -> bool:
        if not self._journals.record_changed() and self.record is not None:
            return False
        try:
            record = self.folder.read()
        except OSError:
            self._journals.forget_record()
            raise
        self.record = record
        self.view.name = record.name
        self._set_state(record, record.state)
        self.view.log = frozenset(self.folder.log_scales() or ())
        self.view.layout = Layouts(self.folder.path.parents[1]).find(self.view.name)
        return True

    def _set_state(self, record: RunRecord, state: str) -> None:
        self.view.state = state
        for rank in record.ranks:
            self.view.set_rank(rank, *record.rank_state(rank))
        self.view.errors = own_errors(record.errors) if state == "failed" else ()
        self.view.seconds = record.times or self.view.seconds
        if not self.view.is_active:
            self.view.end(state)

    def _read_metrics(self, ranks: list[int]) -> tuple[bool, bool]:
        is_news, has_more = False, False
        for rank, records, is_full in self._journals.metrics(ranks):
            has_more |= is_full
            is_news |= self.view.metrics.feed(rank, records)
        return is_news, has_more

    def _take_output(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        self.output.add(rows)
        known = {(report.get("t"), report.get("text")) for report in self.happened.reports}
        for _, record in rows:
            if record.get("kind") != "report":
                continue
            if (record.get("t"), record.get("text")) not in known:
                self.happened.reports.append(record)
            if self.view.is_active:
                hang = Hang(record["text"].strip(), tuple(record.get("late") or ()), tuple(record.get("waiting") or ()))
                self.view.hang = None if record.get("recovered") else hang


class _Journals:
    """Where the reading of a folder is."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._metrics: dict[int, Cursor] = {}
        self._logs: dict[int, Cursor] = {}
        self._marks = Cursor()
        self._stamp: tuple[int, int, int] | None = None
        self._told_times: tuple[int, int] | None = None

    def record_changed(self) -> bool:
        """Whether the record, or how the run is looked at, was written since the last time. Raises NotFound."""
        try:
            found = (self._folder.path / "run.json").stat()
        except OSError:
            raise NotFound(f"there is no run {self._folder.run_id!r}.") from None
        look = 0
        with contextlib.suppress(OSError):
            look = (self._folder.path / "view.json").stat().st_mtime_ns
        before, self._stamp = self._stamp, (found.st_mtime_ns, found.st_ino, look)
        return before != self._stamp

    def forget_record(self) -> None:
        """It could not be read: it is looked at again."""
        self._stamp = None

    def metrics(self, ranks: list[int]) -> list[tuple[int, list[dict[str, Any]], bool]]:
        """(rank, records, whether there may be more) of each journal with something new."""
        found = []
        for rank in ranks:
            path = self._folder.metrics(rank)
            cursor = self._metrics.setdefault(rank, Cursor())
            if _size(path) > cursor.offset and (records := _read_on(path, cursor)):
                found.append((rank, records, _size(path) - cursor.offset >= PASS_BYTES // 4))
        return found

    def times(self) -> tuple[Times, Times] | None:
        """Where the ranks spend their time, when it was written since the last time."""
        try:
            found = (self._folder.path / "times.json").stat()
        except OSError:
            return None
        before, self._told_times = self._told_times, (found.st_mtime_ns, found.st_ino)
        return self._folder.read_times() if before != self._told_times else None

    def marks(self) -> list[dict[str, Any]]:
        """What has happened to the run."""
        if _size(self._folder.marks) == self._marks.offset:
            return []
        return _read_on(self._folder.marks, self._marks)

    def skip_output(self, ranks: list[int]) -> int:
        """Begin with the end of what each rank wrote; returns how many records are left out."""
        skipped = 0
        for rank in ranks:
            path = self._folder.logs(rank)
            if (size := _size(path)) <= TAIL_BYTES:
                continue
            first = _read_on(path, Cursor(size - TAIL_BYTES), TAIL_BYTES)
            if first:
                seq = int(first[0].get("seq", 1)) - 1
                self._logs[rank] = Cursor(size - TAIL_BYTES, seq)
                skipped += seq
        return skipped

    def output(self, ranks: list[int]) -> tuple[list[tuple[int, dict[str, Any]]], bool]:
        """((rank, record) in order of time, whether there may be more)."""
        rows: list[tuple[int, dict[str, Any]]] = []
        has_more = False
        for rank in ranks:
            path = self._folder.logs(rank)
            cursor = self._logs.setdefault(rank, Cursor())
            if _size(path) > cursor.offset and (records := _read_on(path, cursor)):
                rows += [(rank, record) for record in records]
                has_more |= _size(path) - cursor.offset >= PASS_BYTES // 4
        return sorted(rows, key=lambda row: row[1].get("t", 0.0)), has_more


def _read_on(path: Path, cursor: Cursor, max_bytes: int = PASS_BYTES) -> list[dict[str, Any]]:
    """What is new; nothing where a disk, or a process with too many open files, refuses it for the moment."""
    try:
        return read_from(path, cursor, max_bytes)
    except OSError:
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
