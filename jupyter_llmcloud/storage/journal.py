"""Append-only JSON lines, read by cursor.

A journal has one writer. Each record carries `seq` (1, 2, ...) and `t` (seconds since the epoch). A reader keeps a byte
offset; a torn last line (the writer was killed in the middle) is left alone until it is complete or for ever.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

Record = dict[str, Any]
_decode = msgspec.json.Decoder().decode  # a fifth of the time that json takes


MOST_LATE = 1 << 20  # bytes that wait for room on a disk


class JournalWriter:
    """The one writer of a journal file; makes the file at the first record.

    A full disk must not end the run whose log this is: what it does not take is written with the next records, once
    there is room again. `error` holds why there is some left; beyond MOST_LATE the newest of it is lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seq = 0
        self.error: OSError | None = None  # why the last records could not be written
        self._fd: int | None = None
        self._late = b""

    def append(self, records: list[Record]) -> list[Record]:
        """Number, stamp and write records in one system call; returns them as written."""
        self.error = self._opened()
        written = self._numbered(records)
        self._late += "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in written).encode()
        self.flush()
        return written

    def flush(self) -> None:
        """Write what is not written yet."""
        self.error = self._opened()
        try:
            while self._late and self._fd is not None:
                self._late = self._late[os.write(self._fd, self._late) :]
        except OSError as error:
            self.error = error
        if len(self._late) > MOST_LATE:  # whole lines; one that is begun and too long is ended
            self._late = self._late[: self._late.rfind(b"\n", 0, MOST_LATE) + 1] or b"\n"

    def _opened(self) -> OSError | None:
        """Open the file, unless it is; returns why it cannot be."""
        try:
            self._fd = self._open() if self._fd is None else self._fd
        except OSError as error:
            return error
        return None

    def _numbered(self, records: list[Record]) -> list[Record]:
        now = time.time()
        written = []
        for record in records:
            self.seq += 1
            written.append(
                {
                    "seq": self.seq,
                    "t": round(record.get("t", now), 4),
                    **{k: v for k, v in record.items() if k != "t"},
                }
            )
        return written

    def _open(self) -> int:
        """Go on after the last record that is there; a line that was torn by a crash is ended."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_CLOEXEC, 0o600)
        size = os.fstat(fd).st_size
        if size == 0 or self.seq:
            return fd
        for record in read_all(self.path):
            self.seq = max(self.seq, record.get("seq", 0))
        if os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")
        return fd

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@dataclass
class Cursor:
    """A place in a journal: bytes read so far and the last `seq` delivered."""

    offset: int = 0
    seq: int = 0


def read_from(path: Path, cursor: Cursor, max_bytes: int = 1 << 22) -> list[Record]:
    """Records after the cursor, which moves on; nothing is delivered twice."""
    try:
        with path.open("rb") as file:
            file.seek(cursor.offset)
            data = file.read(max_bytes)
            while data and b"\n" not in data and (more := file.read(max_bytes)):
                data += more  # a record longer than that
    except FileNotFoundError:
        return []
    end = data.rfind(b"\n") + 1
    cursor.offset += end
    records = [record for record in _parse(data[:end]) if record.get("seq", 0) > cursor.seq]
    if records:
        cursor.seq = records[-1]["seq"]
    return records


def read_all(path: Path, max_bytes: int = 1 << 22) -> Iterator[Record]:
    """Every complete record of a journal, in order; read some bytes at a time."""
    cursor = Cursor()
    while True:
        before = cursor.offset
        yield from read_from(path, cursor, max_bytes)
        if cursor.offset == before:
            return


def read_last(path: Path, num_bytes: int) -> list[Record]:
    """The complete records among the last bytes of a journal, in order; none of one that is not there."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            data = file.read()
    except FileNotFoundError:
        return []
    whole = data if size <= num_bytes else data.partition(b"\n")[2]
    return list(_parse(whole[: whole.rfind(b"\n") + 1]))


def _parse(data: bytes) -> Iterator[Record]:
    for line in data.splitlines():
        try:
            record = _decode(line)
        except ValueError:  # NaN, Infinity, half characters: for json they are none
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a torn line in the middle: its writer was killed and another took over
        if isinstance(record, dict):
            yield record
