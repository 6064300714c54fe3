"""The newest output of all ranks of a run, bounded, for those who watch it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from jupyter_llmcloud.protocol.http.events import OutputRecord

MAX_RECORDS = 5000
MAX_CHARS = 4 << 20
BATCH_RECORDS = 1000
BATCH_CHARS = 1 << 20


class OutputTail:
    """Records in the order they were read, each with a number; the oldest are let go.

    Attributes:
        num_taken: how many there have been, those before the tail included.
        num_chars: how much it holds.
    """

    def __init__(self) -> None:
        self.num_taken = 0
        self._records: deque[OutputRecord] = deque()
        self.num_chars = 0

    def skip(self, count: int) -> None:
        """So many records were left out before those that come."""
        self.num_taken += count

    def add(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Records of ranks."""
        for rank, row in rows:
            record = output_record(rank, row)
            self._records.append(record)
            self.num_chars += _size(record)
            self.num_taken += 1
        while self._records and (len(self._records) > MAX_RECORDS or self.num_chars > MAX_CHARS):
            self.num_chars -= _size(self._records.popleft())

    def since(self, number: int) -> tuple[list[OutputRecord], int, int]:
        """(records, how many are skipped before them, the number to ask with next): a batch after `number`."""
        first = self.num_taken - len(self._records)
        begin = max(number, first)
        batch: list[OutputRecord] = []
        num_chars = 0
        for at in range(begin - first, len(self._records)):
            record = self._records[at]
            if batch and (len(batch) >= BATCH_RECORDS or num_chars + _size(record) > BATCH_CHARS):
                break
            batch.append(record)
            num_chars += _size(record)
        return batch, begin - number, begin + len(batch)


def _size(record: OutputRecord) -> int:
    return len(record.text) + len(record.html) + len(record.image)


def output_record(rank: int, row: Mapping[str, Any]) -> OutputRecord:
    """As it is sent; what a front end cannot show is left to the text form."""
    kind, data = str(row.get("kind", "")), row.get("data") or {}
    image = data.get("image/png", "")
    return OutputRecord(
        rank=rank,
        seq=int(row.get("seq", 0)),
        t=float(row.get("t", 0.0)),
        kind=kind,
        text=_text(row.get("text", data.get("text/plain", ""))),
        stream=kind if kind in ("stdout", "stderr") else "",
        html=_text(data.get("text/html", "")),
        image=_text(image).replace("\n", ""),
        is_warning=row.get("warning") is True,
    )


def _text(value: Any) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value)
