"""The sweeps of a server: started, gone on with, looked at, stopped."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from jupyter_llmcloud.core.search.population import check_population, read_population
from jupyter_llmcloud.core.search.spec import SweepSpec
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.errors import InternalError, NameTaken, UsageError
from jupyter_llmcloud.protocol.http.search.sweeps import StartSweep, Sweep, SweepTrial
from jupyter_llmcloud.server.api.run_starts import check_syntax
from jupyter_llmcloud.server.sweeps.driver import SweepBoard, SweepDriver, SweepWork
from jupyter_llmcloud.storage.search.study import StudyPlan, SweepStudy, absolute_storage, storage_place
from jupyter_llmcloud.storage.search.sweeps import SweepFolder, SweepRecord, SweepStore, TrialRow, without_password

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.audit import Audit
    from jupyter_llmcloud.server.sweeps.gang import ClusterDoors

OWN_FIELDS = ("source", "cell", "pushed")
STUDY_OPTIONS = ("metric", "direction", "storage")  # of a sweep that goes on: as they were


@dataclass
class Driven:
    """A sweep that goes on here, and what keeps others from it."""

    driver: SweepDriver
    lock: ExitStack
    task: asyncio.Task[None] | None = None


class SweepRegistry:
    """Those of this server, and the records of all others.

    Args:
        doors: to ranks.
    """

    def __init__(self, doors: ClusterDoors, audit: Audit, log: Logger) -> None:
        self._store = SweepStore()
        self._doors = doors
        self._audit = audit
        self._log = log
        self._driven: dict[str, Driven] = {}

    def __len__(self) -> int:
        return len(self._driven)

    # --- looking ---

    async def list(self) -> list[Sweep]:
        """All of them, the newest first, without their trials."""
        records = await asyncio.to_thread(self._store.list)
        return [await asyncio.to_thread(self._describe, record, with_trials=False) for record in records]

    async def wait(self, name: str, seen: int, wait_s: float) -> Sweep:
        """One of them, when it is not as `seen` any more, or after a while. Raises NotFound."""
        driven = self._driven.get(name)
        if driven is None:
            record = await asyncio.to_thread(lambda: self._store.find(name).read())
            return await asyncio.to_thread(self._describe, record)
        await driven.driver.board.wait(seen, wait_s)
        return self._describe(driven.driver.board.record)

    def _describe(self, record: SweepRecord, with_trials: bool = True) -> Sweep:
        driven = self._driven.get(record.name)
        state = record.state if driven else self._store.folder(record.name).true_state(record)
        best = record.best()
        return Sweep(
            name=record.name,
            state=state,
            created=record.created,
            ended=record.ended,
            cluster=record.cluster,
            owner=record.owner,
            reason=record.reason,
            note=record.note,
            spec=record.shown_spec(),
            version=driven.driver.board.version if driven else 0,
            num_trials=len(record.trials),
            best=_trial(best) if best else None,
            importance=record.importance,
            trials=[_trial(row) for row in record.trials] if with_trials else [],
        )

    # --- starting ---

    async def start(self, body: StartSweep, actor: str) -> Sweep:
        """Begin, or go on with one of the same name. Raises what it can be refused with at once."""
        given = {key: value for key, value in body.given().items() if key not in OWN_FIELDS}
        spec, code = SweepSpec.make(given, Interface.REST), _code(body)
        if spec.storage:
            here = body.cell.folder if body.cell is not None else ""
            spec = replace(spec, storage=absolute_storage(spec.storage, here or os.getcwd()))
        asked = {name: getattr(spec, name) for name in given}
        pushed = _decoded(body.pushed)
        lock = ExitStack()
        try:
            driver = await asyncio.to_thread(self._prepare, spec, asked, code, pushed, actor, lock)
        except BaseException:
            lock.close()
            raise
        name = driver.name
        driven = self._driven[name] = Driven(driver, lock)
        driven.task = asyncio.create_task(self._see_to(driven, actor))
        return self._describe(driver.board.record)

    def _prepare(
        self,
        spec: SweepSpec,
        asked: Mapping[str, Any],
        code: dict[str, Any] | None,
        pushed: bytes | None,
        actor: str,
        lock: ExitStack,
    ) -> SweepDriver:
        if spec.resume:
            folder, record, work = self._resumed(asked, code, pushed, lock)
            study = SweepStudy.reopen(_plan(work.spec, folder))
            folder.keep_code(work.code, work.pushed)
        else:
            folder, record, work = self._new(spec, code, pushed, actor, lock)
            study = SweepStudy.create(_plan(work.spec, folder))
            folder.create(record, work.code, work.pushed)
        return SweepDriver(SweepBoard(folder, record), work, study, self._doors, self._log)

    def _new(
        self, spec: SweepSpec, code: dict[str, Any] | None, pushed: bytes | None, actor: str, lock: ExitStack
    ) -> tuple[SweepFolder, SweepRecord, SweepWork]:
        if code is None:
            raise UsageError("source is missing: the cell whose trials are run.")
        folder = self._store.folder(spec.name or self._store.free_name())
        if (folder.path / "sweep.json").exists():
            words = f"there is a sweep {folder.name!r} already: --resume goes on with it, or choose another --name."
            raise NameTaken(words)
        lock.enter_context(folder.driven())
        check_population(spec.prune, spec.sampler, spec.trials)
        named = SweepSpec.make({**spec.as_dict(), "name": folder.name}, Interface.REST)
        record = SweepRecord(folder.name, created=time.time(), spec=named.as_dict(), owner=actor)
        return folder, record, SweepWork(named, code, pushed or b"")

    def _resumed(
        self, given: Mapping[str, Any], code: dict[str, Any] | None, pushed: bytes | None, lock: ExitStack
    ) -> tuple[SweepFolder, SweepRecord, SweepWork]:
        if given.get("name") is None:
            raise UsageError("--resume needs the --name of the sweep to go on with.")
        folder = self._store.find(str(given["name"]))
        lock.enter_context(folder.driven())
        record = folder.read()
        known, known_pushed = folder.code()
        restored = _goes_on(SweepSpec.restore(record.spec), given, folder.name)
        record.spec, record.state, record.ended, record.reason = restored.as_dict(), "running", None, ""
        if pushed is None:
            return (
                folder,
                record,
                SweepWork(restored, {**(code or known), "pushed": known.get("pushed", {})}, known_pushed),
            )
        return folder, record, SweepWork(restored, code or known, pushed)

    async def _see_to(self, driven: Driven, actor: str) -> None:
        driver = driven.driver
        record = driver.board.record
        driver.board.change(trials=[row for row in record.trials if row.state != "running"])
        try:
            await driver.run()
            self._audit.tell(actor, "sweep.end", driver.name, outcome=record.state)
        except Exception as error:
            self._log.error("the sweep %s has failed", driver.name, exc_info=error)
            reason = str(InternalError(f"{type(error).__name__}: {error}"))
            with suppress(OSError):
                driver.board.change(state="failed", reason=reason, ended=time.time())
        finally:
            driven.lock.close()
            del self._driven[driver.name]

    # --- ending ---

    async def stop(self, name: str) -> Sweep:
        """Stop it: what is done is kept. Asked again, its trials are stopped harder."""
        driven = self._driven.get(name)
        if driven is None:
            told = await self.wait(name, -1, 0)
            words = "another server sees to it" if told.state == "running" else f"it is {told.state}"
            raise UsageError(f"the sweep {name!r} does not go on here: {words}.")
        driven.driver.stop()
        return self._describe(driven.driver.board.record)

    async def delete(self, name: str) -> None:
        """Remove one that has ended; its runs stay. Raises NameTaken for one that goes on."""
        await asyncio.to_thread(self._store.delete, name)

    async def close(self) -> None:
        """The server ends: sweeps are left to be gone on with."""
        tasks = [driven.task for driven in self._driven.values() if driven.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _goes_on(began: SweepSpec, asked: Mapping[str, Any], name: str) -> SweepSpec:
    """As it began, but for what is asked now. Raises UsageError for what a study cannot change."""
    for option in STUDY_OPTIONS:
        before, now = getattr(began, option), asked.get(option)
        if now is not None and now != before:
            was = f"with {without_password(before)}" if before else "without it"
            raise UsageError(
                f"--{option} {without_password(now)}: the sweep {name!r} began {was}, and goes on so. Leave it out, or "
                "search anew under another --name."
            )
    changed = {option: value for option, value in asked.items() if option != "resume"}
    goes_on = SweepSpec.restore({**began.as_dict(), **changed})
    before, now = read_population(began.prune), read_population(goes_on.prune)
    if (before and before.size) != (now and now.size):
        raise UsageError(
            f"--prune {goes_on.prune}: the sweep {name!r} began with --prune {began.prune}, and its trials are counted "
            "so. Leave it out, or search anew under another --name."
        )
    check_population(goes_on.prune, goes_on.sampler, goes_on.trials)
    return goes_on


def _plan(spec: SweepSpec, folder: SweepFolder) -> StudyPlan:
    return StudyPlan(
        storage=storage_place(spec.storage, folder.journal),
        name=folder.name,
        direction=spec.direction,
        metric=spec.metric or "",
        sampler=spec.sampler,
        prune=spec.prune,
        seed=spec.seed,
        num_parallel=spec.parallel,
    )


def _code(body: StartSweep) -> dict[str, Any] | None:
    source = body.source
    if not source:
        return None
    cell: Mapping[str, Any] = msgspec.structs.asdict(body.cell) if body.cell is not None else {}
    if not cell:
        check_syntax(source, "")  # a notebook's cell has been compiled there, with its magics
    return {
        "source": source,
        "code": str(cell.get("code") or source),
        "filename": str(cell.get("filename") or "<sweep>"),
        "line_offset": int(cell.get("line_offset") or 0),
        "execution_count": int(cell.get("execution_count") or 0),
        "folder": str(cell.get("folder") or ""),
        "pushed": dict(cell.get("pushed") or {}),
    }


def _decoded(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise UsageError("pushed is no base64.") from None


def _trial(row: TrialRow) -> SweepTrial:
    return SweepTrial(
        number=row.number,
        state=row.state,
        value=row.value,
        step=row.step,
        params=row.params,
        run_id=row.run_id,
        reason=row.reason,
        began=row.began,
        ended=row.ended,
        num_attempts=row.num_attempts,
        generation=row.generation,
        parent=row.parent,
    )
