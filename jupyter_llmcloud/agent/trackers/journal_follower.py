"""Reads the metrics of a run from its journals, wherever a tracker has come to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jupyter_llmcloud.core.metrics.values import StepCount, as_number
from jupyter_llmcloud.storage.journal import Cursor, read_from
from jupyter_llmcloud.storage.runs import RunFolder
from jupyter_llmcloud.system.atomic_files import write_atomically

BATCH_BYTES = 1 << 18


@dataclass(frozen=True)
class Measured:
    """The numbers that were logged together.

    Attributes:
        t: when, in seconds since the epoch.
    """

    step: int
    t: float
    values: dict[str, float]


class JournalFollower:
    """One tracker's place in the journals of a run; kept in a file, so that who takes over goes on there.

    A name is that of the first rank that logs it, as trackers are used in a script: one run, not one for each rank.
    """

    def __init__(self, folder: RunFolder, place: Path) -> None:
        self._folder = folder
        self._place = place
        self._cursors: dict[int, Cursor] = {}
        self._steps: dict[int, StepCount] = {}
        self._sources: dict[str, int] = {}
        self.saved: dict[str, str] = {}  # what the tracker itself keeps
        if place.exists():
            self._restore(json.loads(place.read_text()))

    def _restore(self, kept: dict[str, dict[str, int]]) -> None:
        self.saved = {name: str(value) for name, value in kept["saved"].items()}
        self._sources = kept["sources"]
        for rank, offset in kept["offsets"].items():
            self._cursors[int(rank)] = Cursor(offset=offset)
            self._steps[int(rank)] = StepCount(kept["without"].get(rank, 0))

    def save(self) -> None:
        """What was read so far is sent."""
        kept = {
            "saved": self.saved,
            "sources": self._sources,
            "offsets": {str(rank): cursor.offset for rank, cursor in self._cursors.items()},
            "without": {str(rank): steps.num_without for rank, steps in self._steps.items()},
        }
        write_atomically(self._place, json.dumps(kept).encode(), durable=False)

    def read(self) -> list[Measured]:
        """What is new, some of it when it is much; by rank in the order in which it was logged."""
        found: list[Measured] = []
        for path in sorted((self._folder.path / "metrics").glob("rank-*.jsonl")):
            found += self._of(int(path.stem.removeprefix("rank-")), path)
        return found

    def _of(self, rank: int, path: Path) -> Iterator[Measured]:
        cursor = self._cursors.setdefault(rank, Cursor())
        steps = self._steps.setdefault(rank, StepCount())
        for record in read_from(path, cursor, BATCH_BYTES):
            if not (values := record.get("values")):
                continue
            step = steps.of(record)
            numbers = {name: as_number(value) for name, value in values.items()}
            own = {
                name: float(number)
                for name, number in numbers.items()
                if number is not None and self._sources.setdefault(name, rank) == rank
            }
            if own:
                yield Measured(math.floor(step), record["t"], own)
