"""The journals of a run, read from the beginning and on."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from jupyter_llmcloud.storage import log_text
from jupyter_llmcloud.storage.journal import Cursor, Record, read_from
from jupyter_llmcloud.storage.runs import RunFolder


class RunJournals:
    """Each record once, however often it is asked for."""

    def __init__(self, folder: RunFolder, ranks: Sequence[int]) -> None:
        self._folder = folder
        self._metrics: dict[int, Cursor] = {}
        self._logs: dict[int, Cursor] = {}
        self.follow(ranks)

    def follow(self, ranks: Sequence[int]) -> None:
        """Read those of these ranks, too: an elastic run gets more of them."""
        for rank in ranks:
            self._metrics.setdefault(rank, Cursor())
            self._logs.setdefault(rank, Cursor())

    def metrics(self) -> Iterator[tuple[int, list[Record]]]:
        """What is new, rank by rank."""
        for rank, cursor in self._metrics.items():
            while records := read_from(self._folder.metrics(rank), cursor):
                yield rank, records

    def logs(self) -> Iterator[tuple[int, Record]]:
        """What is new, in order of time."""
        return heapq.merge(*(self._log(rank) for rank in self._logs), key=lambda row: row[1]["t"])

    def _log(self, rank: int) -> Iterator[tuple[int, Record]]:
        while records := read_from(self._folder.logs(rank), self._logs[rank], log_text.CHUNK_BYTES):
            yield from ((rank, record) for record in records)
