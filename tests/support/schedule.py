"""Which test runs in which worker of pytest-xdist, and which tests have the machine to themselves. A plugin of pytest.

Tests that share a fixture of their module run in one worker, one after the other; every other test goes to whichever
worker is free, the longest first. Tests marked `alone` come last, when all workers but one have ended: what they
measure (latencies, memory, shares of the CPU, a Stop within two seconds) says nothing on a machine that is busy.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.session import FOLDER, is_worker

ALONE = "alone"
SHARED_SERVER = "shared_server"  # see the plugin of this name
DURATIONS = "suite/durations"  # in pytest's cache, from the last run in this checkout
MEMORY_PER_WORKER = 2 << 30  # an agent with torch, its ranks, a JupyterLab with its browser
MAX_WORKERS = 8
WORKERS_PER_CORE = 1.5
QUEUED = 2  # a worker begins a test when it knows the next one

NOTES = "tests.json"


@dataclass(frozen=True)
class Unit:
    """Tests that run in one worker, in this order."""

    name: str
    tests: tuple[str, ...]
    seconds: float


def num_workers(cores: int, memory: int) -> int:
    """How many workers pay off: three for two cores, since a test waits almost half of its time for processes and leases.

    With four of them the cores are no busier, and deadlines are missed.
    """
    return max(1, min(int(WORKERS_PER_CORE * cores), MAX_WORKERS, memory // MEMORY_PER_WORKER))


def make_units(tests: Iterable[str], groups: Mapping[str, str], seconds: Mapping[str, float]) -> list[Unit]:
    """Units of all tests but those that run alone, the longest first."""
    found: dict[str, list[str]] = {}
    for test in tests:
        if groups[test] != ALONE:
            found.setdefault(groups[test], []).append(test)
    units = [Unit(name, tuple(rows), sum(seconds[test] for test in rows)) for name, rows in found.items()]
    return sorted(units, key=lambda unit: -unit.seconds)


@dataclass
class Plan:
    """What is still to be given out; knows workers by their names only."""

    units: deque[Unit]
    alone: deque[str]
    begun: dict[str, deque[str]] = field(default_factory=dict)  # the rest of the unit of a worker

    def next(self, worker: str) -> str | None:
        """The next test for a worker that others may run beside."""
        rest = self.begun.setdefault(worker, deque())
        if not rest and self.units:
            rest.extend(self.units.popleft().tests)
        return rest.popleft() if rest else None

    def next_alone(self) -> str | None:
        """The next test that must have the machine to itself."""
        return self.alone.popleft() if self.alone else None

    def lost(self, worker: str) -> None:
        """A worker has gone: others take the rest of its unit."""
        if rest := self.begun.pop(worker, None):
            self.units.append(Unit("the rest of a lost worker's", tuple(rest), 0.0))

    @property
    def is_empty(self) -> bool:
        return not self.units and not self.alone and not any(self.begun.values())


class AloneLast:
    """A scheduler of pytest-xdist (see its `Scheduling`): gives each worker little at a time, so that `-x` ends soon."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        self.config = config
        self.num_nodes = len(config.getvalue("tx"))
        self.plan: Plan | None = None
        self.collections: dict[Any, list[str]] = {}
        self.queued: dict[Any, list[str]] = {}  # by worker: what it was given and has not completed

    @property
    def nodes(self) -> list[Any]:
        return list(self.queued)

    @property
    def collection_is_completed(self) -> bool:
        return len(self.collections) >= self.num_nodes

    @property
    def tests_finished(self) -> bool:
        if self.plan is None or not self.plan.is_empty:
            return False
        return all(len(tests) < QUEUED for tests in self.queued.values())

    @property
    def has_pending(self) -> bool:
        return any(self.queued.values()) or (self.plan is not None and not self.plan.is_empty)

    def add_node(self, node: Any) -> None:
        self.queued[node] = []

    def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
        self.collections[node] = list(collection)

    def schedule(self) -> None:
        """All workers have collected, or one that replaces a crashed worker has."""
        if self.plan is None:
            tests, *others = self.collections.values()
            for other in others:
                if differ := sorted(set(tests) ^ set(other)) or (tests != other and ["their order"]):
                    raise RuntimeError(
                        f"the workers have collected different tests, as by time or a hash: {differ[:3]}"
                    )
            self.plan = self._make_plan(tests)
        self._feed_all()

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        self.queued[node].remove(self.collections[node][item_index])
        self._feed(node)

    def remove_node(self, node: Any) -> str | None:
        """A worker has ended, or crashed while it ran the test that is returned."""
        queued = self.queued.pop(node)
        if self.plan is None:
            return None
        crashed, *rest = queued or [None]
        for test in reversed(rest):
            self.plan.begun.setdefault(node.gateway.id, deque()).appendleft(test)
        self.plan.lost(node.gateway.id)
        self._feed_all()
        return crashed

    def mark_test_pending(self, item: str) -> None:
        raise NotImplementedError

    def remove_pending_tests_from_node(self, node: Any, indices: Sequence[int]) -> None:
        raise NotImplementedError

    def _make_plan(self, tests: list[str]) -> Plan:
        notes = read_notes(self.config.stash[FOLDER])
        cache = getattr(self.config, "cache", None)
        known = cache.get(DURATIONS, {}) if cache is not None else {}
        seconds = {test: known.get(test, notes[test][1]) for test in tests}
        groups = {test: notes[test][0] for test in tests}
        alone = deque(test for test in tests if groups[test] == ALONE)
        return Plan(deque(make_units(tests, groups, seconds)), alone)

    def _feed_all(self) -> None:
        for node in self.nodes:
            self._feed(node)

    def _feed(self, node: Any) -> None:
        """Fill the worker's queue, or let the worker end when there is nothing left for it."""
        while not node.shutting_down and len(self.queued[node]) < QUEUED:
            test = self.plan.next(node.gateway.id)
            if test is None and len(self.queued) == 1:
                test = self.plan.next_alone()
            if test is not None:
                self.queued[node].append(test)
                node.send_runtest_some([self.collections[node].index(test)])
            elif self.plan.alone and self._is_last(node):
                return  # it runs what must run alone as soon as the others have ended
            else:
                node.shutdown()

    def _is_last(self, node: Any) -> bool:
        return all(other is node or other.shutting_down for other in self.nodes)


def group_of(item: pytest.Item) -> str:
    """What runs in one worker: tests that must run alone, those that share a server or a fixture of the module, or one."""
    if item.get_closest_marker(ALONE):
        return ALONE
    if group := item.get_closest_marker("xdist_group"):
        return str(group.args[0])
    fixtures = getattr(item, "_fixtureinfo", None)
    used = [rows[-1] for rows in fixtures.name2fixturedefs.values()] if fixtures else []
    if fixtures and SHARED_SERVER in fixtures.name2fixturedefs:
        return SHARED_SERVER  # in one worker, which starts it, not in each
    return item.nodeid.split("::")[0] if any(row.scope in ("module", "class") for row in used) else item.nodeid


def guess_seconds(item: pytest.Item) -> float:
    """How long a test takes that nobody has timed here yet."""
    names = set(getattr(item, "fixturenames", ()))
    if limit := item.get_closest_marker("timeout"):
        return float(limit.args[0]) / 6  # who needs more time than others says so
    if item.get_closest_marker("slow") or item.get_closest_marker("browser"):
        return 10.0
    return 2.0 if names & {"node_agent", "own_root", "follower"} else 0.05


def write_notes(path: Path, items: Sequence[pytest.Item]) -> None:
    """Tell the scheduler, which sees names only, what it cannot see in them."""
    notes = {item.nodeid: (group_of(item), guess_seconds(item)) for item in items}
    staging = path.with_suffix(".new")
    staging.write_text(json.dumps(notes), encoding="utf-8")
    staging.rename(path)


def read_notes(folder: Path) -> dict[str, tuple[str, float]]:
    """What a worker has told; all have collected the same tests."""
    path = next(folder.parent.glob(f"{folder.name}-*/{NOTES}"), None)
    if path is None:
        raise pytest.UsageError("no worker has collected anything: a path may be wrong; WORKERS=0 tells which.")
    return {test: (group, seconds) for test, (group, seconds) in json.loads(path.read_text(encoding="utf-8")).items()}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return num_workers(len(os.sched_getaffinity(0)), psutil.virtual_memory().available)


def pytest_configure_node(node: Any) -> None:
    """Tell a worker where its folder will be."""
    node.workerinput["folder"] = str(node.config.stash[FOLDER])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> AloneLast:
    return AloneLast(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backwards", action="store_true", help="the last test first: none may need one before it")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that run alone come last also where there is one process only."""
    if config.getoption("--backwards"):
        items.reverse()
    items.sort(key=lambda item: item.get_closest_marker(ALONE) is not None)
    if is_worker(config):
        write_notes(config.stash[FOLDER] / NOTES, items)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration


_seconds: dict[str, float] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remember how long each test took, for the order of the next run."""
    cache = getattr(session.config, "cache", None)  # none with `-p no:cacheprovider`
    if cache is not None and _seconds and not is_worker(session.config):
        known = {**cache.get(DURATIONS, {}), **_seconds}
        cache.set(DURATIONS, {test: round(seconds, 2) for test, seconds in known.items()})
