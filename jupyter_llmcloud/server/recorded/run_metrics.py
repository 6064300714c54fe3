"""What Jupyter's `/metrics` tells of runs: how many there are by state, and the alerts of those that go on.

Read from the records of runs whenever somebody asks for the metrics, since runs do not need a server to go on; a record
is read again only when it has changed.
"""

from __future__ import annotations

import os
from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.storage.runs import ACTIVE_STATES, RunFolder, is_run_name

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from jupyter_llmcloud.storage.runs import RunStore

MAX_RUNS = 200  # that go on, of which each has its own label


@dataclass(frozen=True)
class _Told:
    """What a record says, as of when it was written."""

    written: tuple[int, int]  # when, and the file: it is replaced by each record
    state: str
    alerts: tuple[tuple[str, int], ...]


class RunCollector(Collector):
    """What the records of the servers' runs say."""

    def __init__(self) -> None:
        self._stores: dict[int, RunStore] = {}  # by the id of who has added it
        self._known: dict[Path, _Told] = {}

    def add(self, owner: object, runs: RunStore) -> None:
        """Tell of these too, until `owner` discards them."""
        self._stores[id(owner)] = runs

    def discard(self, owner: object) -> None:
        """Tell of these no longer."""
        self._stores.pop(id(owner), None)

    def collect(self) -> Iterator[Metric]:
        """Runs by state, and how many alerts each of the active ones has had."""
        states = GaugeMetricFamily("llmcloud_runs", "Runs by their state", labels=["state"])
        alerts = GaugeMetricFamily(
            "llmcloud_run_alerts", "Alerts of a run that goes on, by detector", labels=["run", "detector"]
        )
        stores = {store.path for store in self._stores.values()}
        known = self._known = {path: told for store in stores for path, told in self._read(store)}
        for state, number in Tally(told.state for told in known.values()).items():
            states.add_metric([state], number)
        active = [(path, told) for path, told in known.items() if told.state in ACTIVE_STATES]
        for path, told in active[:MAX_RUNS]:
            for detector, number in told.alerts:
                alerts.add_metric([path.name, detector], number)
        yield from (states, alerts)

    def describe(self) -> Iterator[Metric]:
        """Nothing is read when it is registered."""
        return iter(())

    def _read(self, store: Path) -> Iterator[tuple[Path, _Told]]:
        try:
            paths = [path for path in store.iterdir() if is_run_name(path)]
        except OSError:  # there is none yet, or it is somebody else's: the other metrics are told all the same
            return
        for path in paths:
            try:
                file = os.stat(path / "run.json")
                written = (file.st_mtime_ns, file.st_ino)
                told = self._known.get(path)
                if told is None or told.written != written:
                    record = RunFolder(path).read()
                    told = _Told(written, record.state, tuple(record.alerts.items()))
            except (OSError, NotFound):  # removed meanwhile, or not written yet
                continue
            yield path, told


RUNS = RunCollector()
REGISTRY.register(RUNS)
