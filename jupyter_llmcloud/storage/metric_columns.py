"""One metric of a run in memory, every value of every rank, for windows of it.

The journals are read once, and on from there when there is more. A value takes 24 bytes.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from jupyter_llmcloud.core.metrics.values import StepCount, as_number
from jupyter_llmcloud.storage.runs import RunFolder
from jupyter_llmcloud.system.gil import Pace

CHUNK_BYTES = 1 << 22
EPOCH = "epoch"
_PACE_LINES = 1024


class _Line(msgspec.Struct, gc=False):
    t: float = 0.0
    step: float | None = None
    values: dict[str, float | None] | None = None


@dataclass
class RankColumn:
    """The values of one rank in order of their steps; the last value at a step counts."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    times: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: float, time: float, value: float) -> None:
        """A value; a rank that was led back to a checkpoint says some steps again."""
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            self.times.append(time)
            self.values.append(value)
            return
        at = bisect_left(self.steps, step)
        if self.steps[at] == step:
            self.times[at], self.values[at] = time, value
        else:
            self.steps.insert(at, step)
            self.times.insert(at, time)
            self.values.insert(at, value)

    def between(self, low: float, high: float) -> tuple[int, int]:
        """The range of indices of the steps from `low` to `high`."""
        return bisect_left(self.steps, low), bisect_right(self.steps, high)

    def at(self, step: float) -> float | None:
        """The newest value until a step."""
        found = bisect_right(self.steps, step)
        return self.values[found - 1] if found and math.isfinite(self.values[found - 1]) else None


class _Journal:
    """The journal of one rank, read by its offset."""

    def __init__(self, path: Path, metric: str) -> None:
        self.column = RankColumn()
        self.epochs = self.column if metric == EPOCH else RankColumn()
        self._path = path
        self._metric = metric
        self._offset = 0
        self._steps = StepCount()
        decoder = msgspec.json.Decoder(_Line)
        self._decode, self._decode_lines = decoder.decode, decoder.decode_lines

    def read_on(self, pace: Pace) -> None:
        """Take in what is new."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            while data := file.read(CHUNK_BYTES):
                end = data.rfind(b"\n") + 1
                if not end and not (end := (data := data + file.readline()).rfind(b"\n") + 1):
                    return  # a line that is being written
                self._offset += end
                lines = data[:end].splitlines()
                for at in range(0, len(lines), _PACE_LINES):
                    self._take(lines[at : at + _PACE_LINES])
                    pace.rest_when_due()
                file.seek(self._offset)

    def _take(self, lines: list[bytes]) -> None:
        try:
            records = self._decode_lines(b"\n".join(lines))
        except msgspec.MsgspecError:  # NaN and Infinity are no JSON for everybody
            records = [record for line in lines if (record := self._read(line)) is not None]
        metric, epochs = self._metric, self.epochs if self.epochs is not self.column else None
        for record in records:
            if not (values := record.values):
                continue
            step = record.step if record.step is not None else self._steps.of({})
            if epochs is not None and (epoch := values.get(EPOCH)) is not None:
                epochs.add(step, record.t, epoch)
            if metric in values:
                value = values[metric]
                self.column.add(step, record.t, math.nan if value is None else value)

    def _read(self, line: bytes) -> _Line | None:
        try:
            return self._decode(line)
        except msgspec.MsgspecError:
            pass
        try:
            row = json.loads(line)
            found = {name: as_number(value) for name, value in (row.get("values") or {}).items()}
            values: dict[str, float | None] = {name: value for name, value in found.items() if value is not None}
            step = as_number(row["step"]) if "step" in row else None
            is_step = step is not None and math.isfinite(step)
            return _Line(float(row.get("t", 0.0)), step if is_step else None, values)
        except (ValueError, TypeError, AttributeError):
            return None  # torn


class RecordedMetric:
    """Of one metric of a run."""

    def __init__(self, folder: RunFolder, metric: str) -> None:
        self.metric = metric
        self._folder = folder
        self._journals: dict[int, _Journal] = {}

    def read_on(self) -> None:
        """Take in what is new in the journals of all ranks."""
        pace = Pace()
        for path in sorted((self._folder.path / "metrics").glob("rank-*.jsonl")):
            rank = int(path.stem.removeprefix("rank-"))
            if rank not in self._journals:
                self._journals[rank] = _Journal(path, self.metric)
            self._journals[rank].read_on(pace)

    @property
    def num_values(self) -> int:
        """In memory."""
        return sum(len(journal.column.steps) + len(journal.epochs.steps) for journal in self._journals.values())

    @property
    def ranks(self) -> dict[int, tuple[RankColumn, RankColumn]]:
        """(values, epochs) of each rank that logs it."""
        return {
            rank: (journal.column, journal.epochs) for rank, journal in self._journals.items() if journal.column.steps
        }
