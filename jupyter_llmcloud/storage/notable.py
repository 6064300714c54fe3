"""Warnings and hang reports among all that ranks have written, found without parsing the rest of it."""

from __future__ import annotations

import json
from collections.abc import Iterator

from jupyter_llmcloud.storage.journal import Record
from jupyter_llmcloud.storage.runs import RunFolder

_KEYS = (b'"kind":"report"', b'"warning":true')  # as a journal writes them; inside of a text, quotes are escaped


def notable(folder: RunFolder) -> Iterator[tuple[int, Record]]:
    """(rank, record) of each hang report and warning, in order of time."""
    rows = []
    for path in sorted((folder.path / "logs").glob("rank-*.jsonl")):
        rank = int(path.stem.removeprefix("rank-"))
        with path.open("rb") as file:
            rows += [(rank, record) for line in file if (record := _parsed(line)) is not None]
    yield from sorted(rows, key=lambda row: (row[1]["t"], row[0], row[1]["seq"]))


def _parsed(line: bytes) -> Record | None:
    if not any(key in line for key in _KEYS):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None  # torn: its writer was killed
    return record if record.get("kind") == "report" or record.get("warning") is True else None
