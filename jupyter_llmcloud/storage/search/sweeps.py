"""The folder of a sweep.

<root>/sweeps/<name>/sweep.json     what was asked for, its state, a row for each trial
                     cell.py        the source as typed
                     code.json      what else the cell is: its body, where it stands in the notebook
                     pushed.bin     variables that every trial finds, as cloudpickle's bytes
                     study.journal  Optuna's own, unless the study is kept elsewhere
                     population/    states that trials have left for others, of --prune pbt
                     driver.lock    locked by the process that sees to the sweep, as long as it lives
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jupyter_llmcloud import config
from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.errors import NameTaken, NotFound, UsageError
from jupyter_llmcloud.system.atomic_files import read_json, write_atomically, write_json

ENDED = ("done", "pruned", "failed", "unmeasured", "lost", "stopped")
RUN_NUMBER = 4  # digits, in the name of a trial's run
MAX_NAME = 100
NUM_TRIES, TRY_AGAIN_S = 20, 0.005  # to lock a folder that somebody may only look at


@dataclass
class TrialRow:
    """What is told of a trial. `state`: running, or as core.search.rules.Kind; times are seconds since the epoch."""

    number: int
    state: str = "running"
    value: float | None = None
    params: dict[str, Any] = field(default_factory=dict)
    step: int | None = None  # of the last value
    run_id: str = ""
    reason: str = ""
    began: float = 0.0
    ended: float | None = None
    num_attempts: int = 1
    generation: int | None = None  # of a population
    parent: int | None = None  # the trial from whose state it goes on


@dataclass
class SweepRecord:
    """What `sweep.json` holds. `state`: running, finished, failed, stopped; interrupted is found out, never written."""

    name: str
    state: str = "running"
    created: float = 0.0
    ended: float | None = None
    spec: dict[str, Any] = field(default_factory=dict)  # a core.search.spec.SweepSpec
    owner: str = ""
    cluster: str = ""
    reason: str = ""
    note: str = ""  # what it waits for
    importance: dict[str, float] = field(default_factory=dict)  # of each parameter, as Optuna sees it
    trials: list[TrialRow] = field(default_factory=list)

    @property
    def is_maximized(self) -> bool:
        """Whether more is better."""
        return self.spec.get("direction") == "maximize"

    def best(self) -> TrialRow | None:
        """The best of the trials that were done."""
        done = [row for row in self.trials if row.state == "done" and row.value is not None]
        sign = -1 if self.is_maximized else 1
        return min(done, key=lambda row: (sign * (row.value or 0.0), row.number), default=None)

    def row(self, number: int) -> TrialRow | None:
        """The row of a trial."""
        return next((row for row in self.trials if row.number == number), None)

    def shown_spec(self) -> dict[str, Any]:
        """What was asked for, without the password of a storage."""
        return {**self.spec, **({"storage": without_password(url)} if (url := self.spec.get("storage")) else {})}


class SweepFolder:
    """One sweep on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """Of the sweep and the folder."""
        return self.path.name

    @property
    def journal(self) -> Path:
        """Where the study is kept when nothing else is said."""
        return self.path / "study.journal"

    def create(self, record: SweepRecord, code: Mapping[str, Any], pushed: bytes) -> None:
        """Make the folder; the record is written last."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.keep_code(code, pushed)
        self.write(record)

    def keep_code(self, code: Mapping[str, Any], pushed: bytes) -> None:
        """What the trials execute from now on."""
        write_atomically(self.path / "cell.py", str(code["source"]).encode(), durable=False)
        write_json(self.path / "code.json", dict(code), durable=False)
        write_atomically(self.path / "pushed.bin", pushed, durable=False)

    def code(self) -> tuple[dict[str, Any], bytes]:
        """What the trials execute, and the variables that they find. Raises NotFound."""
        known = read_json(self.path / "code.json")
        if known is None:
            raise NotFound(f"the cell of the sweep {self.name!r} is not in its folder any more.")
        try:
            return known, (self.path / "pushed.bin").read_bytes()
        except FileNotFoundError:
            return known, b""

    def write(self, record: SweepRecord) -> None:
        """Replace the record in one rename."""
        write_json(self.path / "sweep.json", _plain(asdict(record)), durable=False)

    def read(self) -> SweepRecord:
        """The record; raises NotFound."""
        told = read_json(self.path / "sweep.json")
        if told is None:
            raise NotFound(f"there is no sweep {self.name!r}.")
        known = SweepRecord.__dataclass_fields__
        trials = [TrialRow(**row) for row in told.pop("trials", [])]
        return SweepRecord(trials=trials, **{key: value for key, value in told.items() if key in known})

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Be the one process that sees to the sweep. Raises NameTaken when another one does."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.path / "driver.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            if not _locked(lock):
                words = f"the sweep {self.name!r} goes on already: %sweeps attach {self.name} follows it."
                raise NameTaken(words)
            yield
        finally:
            os.close(lock)

    @property
    def is_driven(self) -> bool:
        """Whether a process sees to it now. Those who look do not stand in each other's way."""
        try:
            lock = os.open(self.path / "driver.lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def true_state(self, record: SweepRecord) -> str:
        """The state now: one that is running, with nobody who sees to it, is interrupted."""
        return "interrupted" if record.state == "running" and not self.is_driven else record.state


class SweepStore:
    """All sweeps below a root folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.path = (root or config.root()) / "sweeps"

    def folder(self, name: str) -> SweepFolder:
        """The folder of a sweep, whether it exists or not. Raises UsageError for what is no name of a sweep."""
        if not NAME_PATTERN.fullmatch(name) or len(name) > MAX_NAME:
            raise UsageError(f"{name!r} is not the name of a sweep: 1 to {MAX_NAME} letters, digits, '.', '_', '-'.")
        return SweepFolder(self.path / name)

    def list(self) -> list[SweepRecord]:
        """Every sweep, the newest first."""
        records = []
        for path in self.path.iterdir() if self.path.is_dir() else ():
            with suppress(NotFound, TypeError):
                records.append(SweepFolder(path).read())
        return sorted(records, key=lambda record: record.created, reverse=True)

    def names(self) -> set[str]:
        """Of all of them."""
        return {path.parent.name for path in self.path.glob("*/sweep.json")}

    def find(self, name: str) -> SweepFolder:
        """The sweep of this name; raises NotFound with the names there are."""
        folder = self.folder(name)
        if not (folder.path / "sweep.json").exists():
            names = [record.name for record in self.list()][:8]
            known = f"The newest sweeps are: {', '.join(names)}." if names else "There are no sweeps yet."
            raise NotFound(f"there is no sweep {name!r}. {known}")
        return folder

    def free_name(self) -> str:
        """`sweep-1`, or the first number that is free."""
        number = 1
        while (self.path / f"sweep-{number}").exists():
            number += 1
        return f"sweep-{number}"

    def delete(self, name: str) -> None:
        """Remove a sweep that has ended; its runs stay."""
        folder = self.find(name)
        with folder.driven():
            shutil.rmtree(folder.path)


def _locked(lock: int) -> bool:
    """Whether this process alone has it now; somebody who only looks has it for a moment."""
    for _ in range(NUM_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(TRY_AGAIN_S)
        else:
            return True
    return False


def run_name(sweep: str, number: int) -> str:
    """Of the run of a trial."""
    return f"{sweep}-{number:0{RUN_NUMBER}d}"


def without_password(url: str) -> str:
    """`postgresql://me:secret@host/db` without the secret."""
    return re.sub(r"(://[^:/@]+):[^@/]*@", r"\1:***@", url)


def _plain(value: Any) -> Any:
    """What JSON can carry: a number that is none as its name, anything else that it does not know as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value, default=str)
