"""The folder of a run as its leading agent writes it: the record and the ranks' journals. A full disk ends no run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, Times

RETRY_S = 1.0


class RunWriter:
    """What cannot be written is said once; it is written when there is room again, also after the end of the run.

    Args:
        source: the notebook cell.
        say: tells those who follow the run.
    """

    def __init__(self, folder: RunFolder, record: RunRecord, source: str, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._record = record
        self._source = source
        self._say = say
        self._cannot = ""
        self._waits = False  # for room, to write the end of the run
        self._journals: dict[tuple[str, int], JournalWriter] = {}

    def create(self) -> None:
        """Write the source and the first record."""
        try:
            self._folder.create(self._record, self._source)
        except OSError as error:
            self._cannot_write(error)

    def write_record(self) -> None:
        """Write the record as it is now."""
        try:
            self._folder.write(self._record)
        except OSError as error:
            self._cannot_write(error)

    def write_times(self, shares: Times, seconds: Times) -> None:
        """Write where the ranks spend their time. What a full disk does not take is written the next time."""
        with contextlib.suppress(OSError):
            self._folder.write_times(shares, seconds)

    def mark(self, record: dict[str, Any]) -> None:
        """Write down that something happened to the run."""
        self.append("marks", -1, [record])

    def _path(self, kind: str, rank: int) -> Path:
        if kind == "marks":
            return self._folder.marks
        return self._folder.logs(rank) if kind == "logs" else self._folder.metrics(rank)

    def append(self, kind: str, rank: int, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write records to a rank's journal; returns them as written, with their numbers."""
        writer = self._journals.get((kind, rank))
        if writer is None:
            writer = self._journals[(kind, rank)] = JournalWriter(self._path(kind, rank))
        written = writer.append(records)
        if writer.error is not None:
            self._cannot_write(writer.error)
        return written

    def close(self) -> None:
        """Write what is left, and close the journals."""
        for writer in self._journals.values():
            writer.flush()
            writer.close()
        if error := next((writer.error for writer in self._journals.values() if writer.error), None):
            self._cannot_write(error)

    def _again(self) -> None:
        self._waits = False
        self.create()
        self.close()

    def _cannot_write(self, error: OSError) -> None:
        if not self._cannot:
            self._cannot = f"the folder of the run is not complete: {error.strerror or error}. {self._folder.path}"
            self._say(self._cannot)
        if not self._record.is_active and not self._waits and self._folder.path.is_dir():
            self._waits = True
            asyncio.get_running_loop().call_later(RETRY_S, self._again)
