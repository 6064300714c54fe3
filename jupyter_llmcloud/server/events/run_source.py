"""The topic of runs: their folders are watched, so that a start and an end are seen at once, whoever caused them.

Ten times a second the folder of all runs is asked whether it has changed, and the record of each active run: two dozen
calls of `stat`, and nothing is read that has not changed. All records are looked at every ten seconds.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.protocol.http.runs import Run
from jupyter_llmcloud.server.api.runs import as_run, latest
from jupyter_llmcloud.server.events.sources import TopicSource, encoded
from jupyter_llmcloud.storage.runs import RunRecord, RunStore, is_run_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from jupyter_llmcloud.server.api.run_states import RunStates
    from jupyter_llmcloud.server.events.hub import EventHub

LOOK_S = 0.1
FIGURES_S = 1.0  # how often the progress of a run is read
STATES_S = 3.0  # how often the agent of a run is asked whether it goes on
SWEEP_S = 10.0
MAX_RUNS = 1000  # the newest, and those that are active

Stamp = tuple[int, int]


class RunFolders:
    """Which runs there are, and which records have been written again; found without reading them."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._folder_stamp: Stamp | None = None
        self._stamps: dict[str, Stamp | None] = {}  # of each record; None where there is none yet
        self._swept = -SWEEP_S

    def look(self, active: Iterable[str], now: float) -> tuple[list[str], list[str]]:
        """(runs whose record is new or another one, runs that are gone) since the last time."""
        gone: list[str] = []
        watched = {name for name in active if name in self._stamps}
        watched |= {name for name, stamp in self._stamps.items() if stamp is None}
        if (stamp := _stamp(self._store.path)) != self._folder_stamp or now - self._swept >= SWEEP_S:
            names = _names(self._store.path) if stamp is not None else set()
            gone = [name for name in self._stamps if name not in names]
            for name in gone:
                del self._stamps[name]
            watched |= names if now - self._swept >= SWEEP_S else names - self._stamps.keys()
            self._folder_stamp = stamp
            self._swept = now if now - self._swept >= SWEEP_S else self._swept
        changed = []
        for name in watched - set(gone):
            known, found = self._stamps.get(name), _stamp(self._store.path / name / "run.json")
            self._stamps[name] = found
            if found is not None and found != known:
                changed.append(name)
            elif found is None and known is not None:
                gone.append(name)
        return changed, gone


def _names(path: os.PathLike[str]) -> set[str]:
    try:
        with os.scandir(path) as entries:
            return {entry.name for entry in entries if is_run_name(entry) and entry.is_dir()}
    except FileNotFoundError:
        return set()


def _stamp(path: os.PathLike[str]) -> Stamp | None:
    try:
        found = os.stat(path)
    except OSError:  # gone, or not to be read by this user
        return None
    return found.st_mtime_ns, found.st_ino


class RunSource(TopicSource):
    """All runs of this root.

    Args:
        on_news: called when a run has begun or ended: worlds have changed then, too.
    """

    def __init__(self, hub: EventHub, store: RunStore, states: RunStates, on_news: Callable[[], None]) -> None:
        super().__init__(hub, "runs", self._read_all, LOOK_S)
        self._store = store
        self._states = states
        self._on_news = on_news
        self._begin()

    def _begin(self) -> None:
        self._folders = RunFolders(self._store)
        self._records: dict[str, RunRecord] = {}
        self._true: dict[str, tuple[float, str]] = {}  # when the agent was asked, and what it said
        self._figures_at = 0.0
        self._is_known = False

    def hold(self) -> None:
        """Somebody follows it; whoever is the first gets all of them anew."""
        if self._task is None:
            self._begin()
        super().hold()

    async def look(self) -> None:
        """See what has changed, and tell it."""
        now = time.monotonic()
        active = [name for name, record in self._records.items() if record.is_active]
        changed, gone = await asyncio.to_thread(self._folders.look, active, now)
        if not self._is_known:
            await self._tell_all(changed)
            return
        for name in gone:
            self._records.pop(name, None)
            self._hub.remove("runs", name)
        if news := await self._take(changed):
            self._on_news()
        due = set(news)
        if now - self._figures_at >= FIGURES_S:
            self._figures_at = now
            due |= {name for name in active if name in self._records}
        for name in due:
            if (run := await self._item(self._records[name])) is not None:
                self._hub.change("runs", name, encoded("runs", [run])[name])
        self._hub.readable("runs")

    async def _tell_all(self, names: list[str]) -> None:
        await self._take(names)
        self._hub.replace("runs", encoded("runs", await self._read_all()))
        self._is_known, self._figures_at = True, time.monotonic()

    async def _read_all(self) -> list[Run]:
        newest = sorted(self._records.values(), key=lambda record: -record.created)
        chosen = newest[:MAX_RUNS] + [record for record in newest[MAX_RUNS:] if record.is_active]
        found = await asyncio.gather(*map(self._item, chosen))
        return [run for run in found if run is not None]

    async def _take(self, names: list[str]) -> list[str]:
        """Read the records of these runs; returns those that there are."""
        records = await asyncio.to_thread(self._read_records, names)
        self._records.update(records)
        for name in records:
            self._true.pop(name, None)
        return list(records)

    def _read_records(self, names: list[str]) -> dict[str, RunRecord]:
        found = {}
        for name in names:
            try:
                found[name] = self._store.folder(name).read()
            except (NotFound, OSError):
                continue  # gone since, or not to be read: the others are told all the same
        return found

    async def _item(self, record: RunRecord) -> Run | None:
        folder = self._store.folder(record.run_id)
        try:
            figures = await asyncio.to_thread(latest, folder, record)
        except FileNotFoundError:
            return None  # it is being deleted
        return as_run(record, await self._state(record), figures)

    async def _state(self, record: RunRecord) -> str:
        """Its state: the record's, or what has become of it since its agent has gone."""
        if not record.is_active:
            return record.state
        asked_at, state = self._true.get(record.run_id, (-STATES_S, record.state))
        if time.monotonic() - asked_at >= STATES_S:
            if record.run_id not in self._true:  # told at once as it is recorded; asked the next time
                self._true[record.run_id] = (time.monotonic() - STATES_S + FIGURES_S / 2, record.state)
                return record.state
            state = await self._states.true_state(record)
            self._true[record.run_id] = (time.monotonic(), state)
        return state
