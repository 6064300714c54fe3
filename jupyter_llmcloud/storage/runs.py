"""The folder of a run: its spec and state, its journals, its artifacts.

<root>/runs/<run-id>/run.json                 spec and every state change (one writer: the leading agent)
                     cell.py                  the source as typed
                     metrics/rank-0000.jsonl  {"seq", "t", "step", "values": {name: float}}, NaN and Infinity too;
                                              "at", the optimizer steps by then, where a run may be rolled back;
                                              or {"seq", "t", "progress": [done, total], "desc"}
                     logs/rank-0000.jsonl     {"seq", "t", "kind": "stdout" | "stderr", "text"} (of a warning, too), or
                                              {..., "kind": "display" | "result" | "clear_output" | "report", ...}
                     log.txt                  all text of all ranks, once somebody wants it (see storage.log_text)
                     marks.jsonl              {"seq", "t", "mark": kind, "step", "text"}, see MARKS
                     times.json               where the ranks of a run that goes on spend their time (see read_times)
                     watched                  touched while a page watches the run at its server
                     view.json                how it is looked at: {"log": [metrics in powers of ten]}
                     model/                   what --save wrote
                     checkpoints/step-<n>/    complete training states (see storage.checkpoints)
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jupyter_llmcloud import config
from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.errors import NotFound, UsageError, WorldError
from jupyter_llmcloud.storage.journal import Record, read_all
from jupyter_llmcloud.storage.search.sweeps import SweepStore
from jupyter_llmcloud.system.atomic_files import read_json, write_atomically, write_json

# Asking the system for each would cost a short cell a tenth of its time: the call lets other threads take over.
_noise = random.Random()
os.register_at_fork(after_in_child=_noise.seed)
ACTIVE_STATES = ("queued", "running", "stopping")
MARKS = ("checkpoint", "restart", "resize", "alert")
FINAL_STATES = ("finished", "failed", "stopped", "lost")
Times = dict[int, dict[str, float]]  # by rank and part
WATCHED_S = 10.0  # a page that watches is noted more often than this
ROOM = 16 << 10  # bytes that a record and the first lines of its journals need


def nonce() -> str:
    """Eight hexadecimal digits that make a name unique; no secret."""
    return f"{_noise.getrandbits(32):08x}"


@dataclass(repr=False)
class RunRecord:
    """What `run.json` holds. Times are seconds since the epoch."""

    run_id: str
    name: str
    state: str = "queued"
    created: float = 0.0
    ended: float | None = None
    ranks: list[int] = field(default_factory=list)
    world_size: int = 0
    world_id: str = ""
    cluster: str = ""
    agent: str = ""  # socket of the leading agent, by which a living run is stopped
    host: str = ""  # that has this socket, when it is not the host of whoever started the run
    owner: str = ""
    starter: dict[str, Any] = field(default_factory=dict)  # until an agent has it: {"host", "pid", "started"}
    spec: dict[str, Any] = field(default_factory=dict)  # what was asked for: a core.spec.RunSpec
    script: dict[str, Any] = field(default_factory=dict)  # which script was run, if it was one: a core.spec.Script
    history: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
    not_finite: dict[str, dict[str, Any]] = field(default_factory=dict)  # {metric: {"count", "first", "since"}}
    alerts: dict[str, int] = field(default_factory=dict)  # how many, by detector
    num_restarts: int = 0
    num_resizes: int = 0  # while it went on: its members had changed
    num_rollbacks: int = 0  # to a checkpoint from before something that a detector had found
    left_out: list[list[int]] = field(default_factory=list)  # [first, last] of the optimizer steps that change nothing
    agents_left_out: list[str] = field(default_factory=list)  # `HOST:SOCKET`, that get no rank of it any more
    hang: dict[str, Any] = field(default_factory=dict)  # while its ranks do not go on: {"t", "text", "late", "waiting"}
    diagnosis: dict[str, Any] = field(default_factory=dict)  # why it failed: a core.detect.diagnosis.Diagnosis
    price: float = 0.0  # of an hour of a rank; 0 where nobody has said any
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # {rank: {part of core.run.time_split: seconds}}
    versions: dict[str, str] = field(default_factory=dict)  # of Python and of libraries, as the leading agent has them
    topology: dict[str, Any] = field(default_factory=dict)  # {"hosts": [ranks of each], "threads": by rank, "device"}
    git: dict[str, str] = field(default_factory=dict)  # {"commit", "branch", "folder"} of where its ranks work
    pushed: dict[str, str] = field(default_factory=dict)  # since the cell before: {name: its literal, or ""}

    def __repr__(self) -> str:
        took = f" after {self.ended - self.created:.1f} s" if self.ended else ""
        return f"<Run {self.run_id}: {self.state}{took}, {len(self.ranks)} of {self.world_size} ranks>"

    @property
    def is_active(self) -> bool:
        """Whether the run has not ended."""
        return self.state in ACTIVE_STATES

    @property
    def times(self) -> Times:
        """Seconds by rank and part, once it has ended."""
        return _by_rank(self.seconds)

    def cost(self, seconds: Times) -> float | None:
        """What it has cost, when its ranks have taken so long; None without a price."""
        return self.price * sum(sum(parts.values()) for parts in seconds.values()) / 3600 if self.price else None

    @property
    def notes(self) -> list[str]:
        """What was noted on the way."""
        return [str(entry["why"]) for entry in self.history if "why" in entry]

    def rank_state(self, rank: int) -> tuple[str, str]:
        """The state of a rank and a detail, as far as they are recorded."""
        for number, error in enumerate(self.errors):
            is_culprit = not number and self.state == "failed"
            if error["rank"] == rank and (is_culprit or not _is_released(error)):
                return "failed", str(error.get("ename", ""))
        if self.is_active:
            return ("queued" if self.state == "queued" else "running"), ""
        return {"finished": "done", "failed": "stopped"}.get(self.state, self.state), ""


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run_id(self) -> str:
        """The id, which is the name of the folder."""
        return self.path.name

    @property
    def root(self) -> str:
        """The path of the root below which it is."""
        return os.path.dirname(os.path.dirname(self.path))

    @property
    def exists(self) -> bool:
        """Whether it has a record."""
        return (self.path / "run.json").exists()

    @property
    def model(self) -> Path:
        """Where `--save` writes a model."""
        return self.path / "model"

    def metrics(self, rank: int) -> Path:
        """The journal of metrics of a rank."""
        return self.path / "metrics" / f"rank-{rank:04d}.jsonl"

    @property
    def marks(self) -> Path:
        """The journal of what happened to the run: checkpoints, restarts."""
        return self.path / "marks.jsonl"

    def alerts(self) -> list[dict[str, Any]]:
        """What its detectors have found, in order: {"t", "detector", "step", "text", "evidence", "ranks", ...}."""
        if not self.marks.exists():
            return []
        return [mark for mark in read_all(self.marks) if mark["mark"] == "alert" and "detector" in mark]

    def note_watched(self) -> None:
        """A page watches the run at its server, now."""
        with contextlib.suppress(OSError):
            (self.path / "watched").touch()

    @property
    def is_watched(self) -> bool:
        """Whether a page has watched it at its server of late."""
        try:
            return time.time() - (self.path / "watched").stat().st_mtime < WATCHED_S
        except OSError:
            return False

    def write_times(self, shares: Times, seconds: Times) -> None:
        """Where the ranks spend their time, of the last seconds and of all; replaced in one rename. Raises OSError."""
        self._write("times.json", json.dumps({"shares": shares, "seconds": seconds}).encode())

    def read_times(self) -> tuple[Times, Times]:
        """As it was written last; nothing of a run that tells nothing."""
        try:
            found = json.loads((self.path / "times.json").read_text(encoding="utf-8"))
            return _by_rank(found["shares"]), _by_rank(found["seconds"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}, {}

    def logs(self, rank: int) -> Path:
        """The journal of output of a rank."""
        return self.path / "logs" / f"rank-{rank:04d}.jsonl"

    def create(self, record: RunRecord, source: str) -> None:
        """Make the folder; the record is written last, so that a folder with a record is complete."""
        try:
            self._write_source(source.encode())
        except FileNotFoundError:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write_source(source.encode())
        self.write(record)

    def _write_source(self, data: bytes) -> None:
        # In place: nobody reads it before there is a record, and with a later one it is the same.
        fd = os.open(os.path.join(self.path, "cell.py"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            written = 0
            while written < len(data):
                written += os.write(fd, data[written:])
            os.ftruncate(fd, written)
        finally:
            os.close(fd)

    def write(self, record: RunRecord) -> None:
        """Replace `run.json` in one rename; in its own blocks when the disk is full, so that a run's end is told."""
        data = _as_json(record)
        try:
            self._write("run.json", data)
        except OSError:
            if not any(map(self._overwrite, (data, _as_json(_in_short(record))))):
                raise

    def _write(self, name: str, data: bytes) -> None:
        # Not durable: it is on the way of every cell. Readable to whom the user opens the folder, as its journals are.
        write_atomically(os.path.join(self.path, name), data, mode=0o666, durable=False)

    def _overwrite(self, data: bytes) -> bool:
        try:
            fd = os.open(self.path / "run.json", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fits = len(data) <= os.fstat(fd).st_blocks * 512
            if fits:
                os.pwrite(fd, data, 0)
                os.ftruncate(fd, len(data))
            return fits
        finally:
            os.close(fd)

    def check_free_space(self) -> None:
        """Raises WorldError when no record can be written where this folder will be."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent, buffering=0) as file:
                file.write(bytes(ROOM))
        except OSError as error:
            reason = f"there is no room for a run in {self.path.parent}: {error.strerror}"
            raise WorldError(f"{reason}. Nothing was run.") from None

    def read(self) -> RunRecord:
        """The record; raises NotFound when there is none."""
        try:
            data = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            known = {key: value for key, value in data.items() if key in RunRecord.__dataclass_fields__}
            return RunRecord(**{**known, "run_id": self.run_id})  # of a folder that was copied, too
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError):
            raise NotFound(f"there is no run {self.run_id!r}.") from None

    def set_log_scales(self, metrics: list[str]) -> None:
        """Remember which metrics are drawn in powers of ten, for every later view of the run."""
        self._write("view.json", json.dumps({"log": metrics}).encode())

    def log_scales(self) -> list[str] | None:
        """Those metrics; None when nobody has said."""
        try:
            return list(json.loads((self.path / "view.json").read_text(encoding="utf-8"))["log"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def source(self) -> str:
        """The source of the cell or script, as typed. Raises OSError."""
        return (self.path / "cell.py").read_text(encoding="utf-8")

    def records(self, kind: str) -> Iterator[tuple[int, Record]]:
        """(rank, record) of every journal of `kind` ("metrics" or "logs"), in order of time."""
        rows = []
        for path in sorted((self.path / kind).glob("rank-*.jsonl")):
            rank = int(path.stem.removeprefix("rank-"))
            rows += [(rank, record) for record in read_all(path)]
        yield from sorted(rows, key=lambda row: (row[1]["t"], row[0], row[1]["seq"]))


ROOT_TOLD = "root.json"  # of a root that is the local part of a URL: {"url"}


def root_url_of(root: str | Path) -> str:
    """The URL of which a root is the local part; "" of one that stands for itself."""
    return str((read_json(os.path.join(root, ROOT_TOLD)) or {}).get("url", ""))


@lru_cache(maxsize=16)
def _runs_below(root: Path) -> Path:
    return root / "runs"


class RunStore:
    """All runs below a root folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.path = _runs_below(root or config.root())
        if root is None and (url := config.root_url()) and not self.url:
            # Whoever leads a run finds it beside the run, in whatever environment.
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(self.path.parent / ROOT_TOLD, {"url": url}, durable=False)

    @property
    def url(self) -> str:
        """Where its runs are copied to and fetched from; "" for nowhere."""
        return root_url_of(self.path.parent)

    def folder(self, run_id: str) -> RunFolder:
        """The folder of a run, whether it exists or not. Raises UsageError for what is no name of a run."""
        if not NAME_PATTERN.fullmatch(run_id):
            raise UsageError(f"{run_id!r} is not the name of a run.")
        return RunFolder(self.path / run_id)

    def list(self) -> list[RunRecord]:
        """Every run, the newest first."""
        records = []
        if self.path.is_dir():
            for path in filter(is_run_name, self.path.iterdir()):
                try:
                    records.append(RunFolder(path).read())
                except (NotFound, OSError):  # of somebody else's root, say, whose runs are theirs alone
                    continue
        return sorted(records, key=lambda record: record.created, reverse=True)

    def find(self, name: str) -> RunFolder:
        """The run with this id, else the newest run with this name; raises NotFound with the names there are."""
        if NAME_PATTERN.fullmatch(name) and (self.path / name / "run.json").exists():
            return RunFolder(self.path / name)
        records = self.list()
        for record in records:
            if record.name == name:
                return RunFolder(self.path / record.run_id)
        names = list(dict.fromkeys(record.name for record in records))[:8]
        known = f"The newest runs are: {', '.join(names)}." if names else "There are no runs yet."
        raise NotFound(f"there is no run {name!r}. {self._told_of_sweep(name) or known}")

    def _told_of_sweep(self, name: str) -> str:
        """What to name instead, of a sweep; "" where there is none of this name."""
        try:
            best = SweepStore(self.path.parent).find(name).read().best()
        except (NotFound, UsageError):
            return ""
        return f"{name!r} is a sweep: " + (
            f"the run of its best trial is {best.run_id}." if best else "no trial is done."
        )

    def delete(self, name: str) -> str:
        """Remove a run that has ended; returns its id."""
        folder = self.find(name)
        if folder.read().is_active:
            raise UsageError(f"run {folder.run_id!r} is still active: stop it first (%runs stop {name}).")
        shutil.rmtree(folder.path)
        return folder.run_id


def is_run_name(path: os.PathLike[str]) -> bool:
    """Whether a folder is named as those of runs are: what a file manager has copied beside them is none."""
    return NAME_PATTERN.fullmatch(os.path.basename(path)) is not None


def _by_rank(found: Mapping[str, dict[str, float]]) -> Times:
    return {int(rank): parts for rank, parts in found.items()}


def _is_released(error: Mapping[str, Any]) -> bool:
    """Whether a rank was merely stopped with the run, or let out of a collective."""
    return bool(error.get("collateral") or error.get("interrupted")) or error.get("ename") == "KeyboardInterrupt"


def _as_json(record: RunRecord) -> bytes:
    return json.dumps(vars(record)).encode()


def _in_short(record: RunRecord) -> RunRecord:
    """Without what may be long."""
    first = [{**error, "evalue": error["evalue"][:300], "traceback": [], "locals": {}} for error in record.errors[:1]]
    return replace(record, errors=first, history=record.history[-3:], spec={}, script={}, versions={}, pushed={})
