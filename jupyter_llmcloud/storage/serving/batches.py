"""Batches: many requests to endpoints that are answered when there is room, and whose results are kept.

<root>/batches/<id>/batch.json      what it is and how far it is
                    input.jsonl     its rows, as they were uploaded
                    results.jsonl   a line per row that is over, in the order in which they ended; a torn last line is
                                    skipped, and its row asked again
                    lock            held (flock) by the one server that works on it
"""

from __future__ import annotations

import builtins
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jupyter_llmcloud import config
from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.system.atomic_files import read_json, write_json

ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass
class StoredBatch:
    """One batch as it is kept. Times are seconds since the epoch.

    Attributes:
        owner: who it belongs to, as usage names them.
        key_id: of the key it came with, whose scopes it has; None for a Jupyter user.
        url: what its rows are posted to: /v1/chat/completions.
        models: the endpoints that its rows ask.
        status: validating, in_progress, finalizing, cancelling or one of `ENDED`.
        num_rows, num_completed, num_failed: counts of rows.
        prompt_tokens, completion_tokens: what its answers have cost.
        errors: [{code, message, param, line}]: why it was not begun.
    """

    id: str
    owner: str
    key_id: str | None
    url: str
    input_file_id: str
    created: float
    expires: float
    metadata: dict[str, str] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    status: str = "validating"
    num_rows: int = 0
    num_completed: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    began: float | None = None
    ended: float | None = None

    @property
    def is_over(self) -> bool:
        """Nothing more will be done for it."""
        return self.status in ENDED


@dataclass(frozen=True)
class RowResult:
    """How a row ended.

    Attributes:
        row: its number in the input, from 0.
        ok: it was answered.
        line: the line of the output or error file.
        usage: tokens of the prompt and of the answer.
    """

    row: int
    ok: bool
    line: dict[str, Any]
    usage: tuple[int, int] = (0, 0)


class BatchFolder:
    """The folder of one batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._results: int | None = None

    @property
    def input(self) -> Path:
        """Its rows."""
        return self.path / "input.jsonl"

    def read(self) -> StoredBatch | None:
        """What is kept of it; None when there is nothing that can be read."""
        about = read_json(self.path / "batch.json")
        if about is None:
            return None
        return StoredBatch(**{name: value for name, value in about.items() if name in StoredBatch.__dataclass_fields__})

    def save(self, batch: StoredBatch) -> None:
        """Keep it as it is now."""
        write_json(self.path / "batch.json", asdict(batch))

    def request_cancel(self) -> None:
        """Tell whichever server works on it to stop."""
        (self.path / "cancel").touch(mode=0o600)

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody has."""
        return (self.path / "cancel").exists()

    # --- one server at a time ---

    def lock(self) -> bool:
        """Work on it from now on; False when another server does. The system frees the lock of a dead process."""
        fd = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        self._lock = fd
        return True

    def unlock(self) -> None:
        """Work on it no longer."""
        for fd in (self._results, self._lock):
            if fd is not None:
                os.close(fd)
        self._lock = self._results = None

    # --- rows and results ---

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """(number, line) of every row; blank lines are none."""
        with self.input.open("rb") as file:
            lines = (line.strip() for line in file)
            yield from enumerate(line for line in lines if line)

    def add(self, result: RowResult) -> None:
        """Keep how a row ended: one write, so that a kill leaves at most one torn line."""
        if self._results is None:
            self._results = os.open(
                self.path / "results.jsonl", os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600
            )
            size = os.fstat(self._results).st_size
            if size and os.pread(self._results, 1, size - 1) != b"\n":
                os.write(self._results, b"\n")  # behind the torn line of a server that was killed
        data = memoryview(json.dumps(asdict(result), separators=(",", ":")).encode() + b"\n")
        while data:
            data = data[os.write(self._results, data) :]

    def offsets(self) -> dict[int, tuple[int, bool]]:
        """Where in the results each row that is over stands, and whether it was answered."""
        found: dict[int, tuple[int, bool]] = {}
        for offset, result in self._stored():
            found.setdefault(result.row, (offset, result.ok))
        return found

    def results(self) -> Iterator[RowResult]:
        """How each row that is over ended, once each."""
        seen: set[int] = set()
        for _, result in self._stored():
            if result.row not in seen:
                seen.add(result.row)
                yield result

    def result_at(self, offset: int) -> RowResult:
        """The result that stands there."""
        with (self.path / "results.jsonl").open("rb") as file:
            file.seek(offset)
            return RowResult(**json.loads(file.readline()))

    def _stored(self) -> Iterator[tuple[int, RowResult]]:
        try:
            file = (self.path / "results.jsonl").open("rb")
        except FileNotFoundError:
            return
        with file:
            offset = 0
            for line in file:
                try:
                    yield offset, RowResult(**json.loads(line))
                except (ValueError, TypeError):
                    pass  # torn: its row is asked again
                offset += len(line)


class BatchStore:
    """The batches of one root."""

    def __init__(self, root: Path | None = None) -> None:
        self._folder = (root or config.root()) / "batches"

    def create(self) -> BatchFolder:
        """A folder for a new batch."""
        path = self._folder / f"batch_{secrets.token_hex(12)}"
        path.mkdir(mode=0o700, parents=True)
        return BatchFolder(path)

    def folder(self, batch_id: str) -> BatchFolder:
        """The folder of a batch; raises NotFound."""
        path = self._folder / batch_id
        if not NAME_PATTERN.fullmatch(batch_id) or not (path / "batch.json").exists():
            raise NotFound(f"there is no batch {batch_id[:128]!r}.")
        return BatchFolder(path)

    def list(self) -> builtins.list[StoredBatch]:
        """Every batch, the newest first."""
        folders = self._folder.iterdir() if self._folder.is_dir() else ()
        found = [batch for path in folders if (batch := BatchFolder(path).read()) is not None]
        return sorted(found, key=lambda batch: (-batch.created, batch.id))
