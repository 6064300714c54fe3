"""Everything the ranks of a run have written, as one text file that any editor opens."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from jupyter_llmcloud.storage.journal import Record, read_all
from jupyter_llmcloud.storage.runs import RunFolder
from jupyter_llmcloud.system.atomic_files import staged
from jupyter_llmcloud.system.gil import Pace

NAME = "log.txt"
PIECE = 1 << 17  # characters
TICK_S = 0.1  # by which the time of a file may be behind the clock, and more: systems count it in ticks
CHUNK_BYTES = 1 << 16  # of a journal: what takes well below a millisecond to parse


def in_order(folder: RunFolder, rank: int | None = None) -> Iterator[tuple[int, Record]]:
    """(rank, log record) in order of time, read as it is asked for."""
    paths = {int(path.stem.removeprefix("rank-")): path for path in sorted((folder.path / "logs").glob("rank-*.jsonl"))}
    journals = [_of(number, path) for number, path in paths.items() if rank in (None, number)]
    return heapq.merge(*journals, key=lambda row: row[1]["t"])


def _of(rank: int, path: Path) -> Iterator[tuple[int, Record]]:
    return ((rank, record) for record in read_all(path, CHUNK_BYTES))


def lines(folder: RunFolder, rank: int | None = None, pace: Pace | None = None) -> Iterator[str]:
    """Every complete line, labelled with its rank; of what is no text, the text that stands in for it."""
    return joined(in_order(folder, rank), pace)


def joined(rows: Iterable[tuple[int, Record]], pace: Pace | None = None) -> Iterator[str]:
    """The lines of (rank, log record) in order of time; what a rank has not ended yet comes last."""
    begun: dict[tuple[int, str], list[str]] = {}
    for number, record in rows:
        if pace is not None:
            pace.rest_when_due()
        kind = str(record["kind"])
        text = record.get("text")
        if text is None:
            plain = (record.get("data") or {}).get("text/plain", "")
            text = f"{plain}\n" if plain else ""
        whole = kind not in ("stdout", "stderr")
        for at, line in enumerate(text.split("\n")):
            part = begun.setdefault((number, kind), [])
            if at:
                yield "".join([f"[{number}] ", *part])  # a long line is not copied more often than it must be
                part.clear()
            if line:
                part.append(line)
        if whole and (part := begun.pop((number, kind), [])):
            yield f"[{number}] {''.join(part)}"
    for (number, _), part in begun.items():
        if part:
            yield f"[{number}] {''.join(part)}"


def pieces(folder: RunFolder, rank: int | None = None) -> Iterator[bytes]:
    """The same as bytes, some lines at a time."""
    ready: list[str] = []
    size, pace = 0, Pace()
    for line in lines(folder, rank, pace):
        ready.append(f"{line}\n")
        size += len(line)
        pace.rest_when_due()
        if size >= PIECE:
            yield "".join(ready).encode("utf-8", "replace")
            ready, size = [], 0
    if ready:
        yield "".join(ready).encode("utf-8", "replace")


def path(folder: RunFolder) -> Path:
    """Where `write` leaves the file."""
    return folder.path / NAME


def write(folder: RunFolder) -> Path:
    """Write the file as far as the run has come, unless that has been done."""
    done = path(folder)
    journals = [journal.stat().st_mtime for journal in (folder.path / "logs").glob("rank-*.jsonl")]
    if done.exists() and done.stat().st_mtime > max(journals, default=0.0):
        return done
    began = time.time() - TICK_S
    with staged(done, durable=False) as file:  # it can be made again from the journals
        pace = Pace()
        for line in lines(folder, pace=pace):
            file.write(line.encode("utf-8", "replace") + b"\n")
            pace.rest_when_due()
        file.flush()
        os.utime(file.fileno(), (began, began))  # what came meanwhile is not in it, perhaps
    return done
