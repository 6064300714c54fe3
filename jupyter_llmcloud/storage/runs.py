"""The folder of a run: its spec and state, its journals, its artifacts.

<root>/runs/<run-id>/run.json                 spec and every state change (one writer: the leading agent)
                     cell.py                  the source as typed
                     metrics/rank-0000.jsonl  {"seq", "t", "step", "values": {name: float}}
                                              or {"seq", "t", "progress": [done, total], "desc"}
                     logs/rank-0000.jsonl     {"seq", "t", "kind": "stdout" | "stderr", "text"} or
                                              {..., "kind": "display" | "result" | "error", ...}
                     model/                   what --save wrote
                     checkpoints/step-<n>/    complete training states (see storage.checkpoints)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_llmcloud import config
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.storage.journal import Record, read_all

ACTIVE_STATES = ("queued", "running", "stopping")
FINAL_STATES = ("finished", "failed", "stopped", "lost")


@dataclass
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
    owner: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE_STATES


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def model(self) -> Path:
        return self.path / "model"

    def metrics(self, rank: int) -> Path:
        return self.path / "metrics" / f"rank-{rank:04d}.jsonl"

    def logs(self, rank: int) -> Path:
        return self.path / "logs" / f"rank-{rank:04d}.jsonl"

    def create(self, record: RunRecord, source: str) -> None:
        """Make the folder; the record is written last, so that a folder with a record is complete."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.path / "cell.py").write_text(source, encoding="utf-8")
        self.write(record)

    def write(self, record: RunRecord) -> None:
        """Replace `run.json` in one rename."""
        aside = self.path / ".run.json.aside"
        aside.write_text(json.dumps(vars(record)), encoding="utf-8")
        os.replace(aside, self.path / "run.json")

    def read(self) -> RunRecord:
        """The record; raises NotFound when there is none."""
        try:
            data = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise NotFound(f"there is no run {self.run_id!r}.") from None
        known = RunRecord.__dataclass_fields__
        return RunRecord(**{key: value for key, value in data.items() if key in known})

    def source(self) -> str:
        return (self.path / "cell.py").read_text(encoding="utf-8")

    def records(self, kind: str) -> Iterator[tuple[int, Record]]:
        """(rank, record) of every journal of `kind` ("metrics" or "logs"), in order of time."""
        rows = []
        for path in sorted((self.path / kind).glob("rank-*.jsonl")):
            rank = int(path.stem.removeprefix("rank-"))
            rows += [(rank, record) for record in read_all(path)]
        yield from sorted(rows, key=lambda row: (row[1]["t"], row[0], row[1]["seq"]))


class RunStore:
    """All runs below a root folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.path = (root or config.root()) / "runs"

    def folder(self, run_id: str) -> RunFolder:
        if not config.NAME_PATTERN.fullmatch(run_id):
            raise UsageError(f"{run_id!r} is not the name of a run.")
        return RunFolder(self.path / run_id)

    def list(self) -> list[RunRecord]:
        """Every run, the newest first."""
        records = []
        if self.path.is_dir():
            for path in self.path.iterdir():
                try:
                    records.append(RunFolder(path).read())
                except NotFound:
                    continue
        return sorted(records, key=lambda record: record.created, reverse=True)

    def find(self, name: str) -> RunFolder:
        """The run with this id, else the newest run with this name; raises NotFound with the names there are."""
        if config.NAME_PATTERN.fullmatch(name) and (self.path / name / "run.json").exists():
            return RunFolder(self.path / name)
        records = self.list()
        for record in records:
            if record.name == name:
                return RunFolder(self.path / record.run_id)
        names = list(dict.fromkeys(record.name for record in records))[:8]
        known = f"The newest runs are: {', '.join(names)}." if names else "There are no runs yet."
        raise NotFound(f"there is no run {name!r}. {known}")

    def delete(self, name: str) -> str:
        """Remove a run that has ended; returns its id."""
        folder = self.find(name)
        if folder.read().is_active:
            raise UsageError(f"run {folder.run_id!r} is still active: stop it first (%runs stop {name}).")
        shutil.rmtree(folder.path)
        return folder.run_id
