"""The suite itself: which test runs where and when, by values; what a failed test leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.support import kept_logs, leaks
from tests.support.schedule import AloneLast, Plan, Unit, make_units, num_workers
from tests.support.worlds import alive, until

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("cores", "gigabytes", "workers"), [(1, 64, 1), (2, 22, 3), (4, 30, 6), (64, 500, 8), (8, 5, 2), (8, 1, 1)]
)
def test_workers_are_counted_by_cores_and_memory(cores: int, gigabytes: int, workers: int) -> None:
    assert num_workers(cores, gigabytes << 30) == workers


def test_the_longest_come_first_and_those_of_one_group_together() -> None:
    groups = {"a::1": "a", "b::1": "b::1", "a::2": "a", "c::1": "alone"}
    units = make_units(groups, groups, {"a::1": 1, "b::1": 5, "a::2": 2, "c::1": 100})
    assert units == [Unit("b::1", ("b::1",), 5), Unit("a", ("a::1", "a::2"), 3)]


@dataclass
class Node:
    """A worker as the scheduler sees it."""

    name: str
    given: list[int] = field(default_factory=list)
    shutting_down: bool = False

    @property
    def gateway(self) -> Any:
        return SimpleNamespace(id=self.name)

    def __hash__(self) -> int:
        return hash(self.name)

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down
        self.given += indices

    def shutdown(self) -> None:
        self.shutting_down = True


TESTS = ["m::1", "m::2", "m::3", "x::1", "y::1", "z::1", "z::2"]


def make_scheduler(num_nodes: int, alone: list[str]) -> tuple[AloneLast, list[Node]]:
    config: Any = SimpleNamespace(getvalue=lambda name: ["popen"] * num_nodes)
    scheduler, nodes = AloneLast(config), [Node(f"gw{number}") for number in range(num_nodes)]
    for node in nodes:
        scheduler.add_node(node)
        scheduler.add_node_collection(node, TESTS)
    units = [Unit("m", ("m::1", "m::2", "m::3"), 9), Unit("x", ("x::1",), 1), Unit("y", ("y::1",), 1)]
    scheduler.plan = Plan(deque(units), deque(alone))
    scheduler.schedule()
    return scheduler, nodes


def run_all(scheduler: AloneLast, nodes: list[Node]) -> list[tuple[str, str]]:
    """Play the workers, in turn, until all have ended; each runs a test when it knows what comes after it."""
    ran: list[tuple[str, str]] = []
    working = list(nodes)
    for _ in range(100):
        for node in list(working):
            if node.given and (len(node.given) > 1 or node.shutting_down):
                number = node.given.pop(0)
                ran.append((node.name, TESTS[number]))
                scheduler.mark_test_complete(node, number)
            elif node.shutting_down and not node.given:
                working.remove(node)
                assert scheduler.remove_node(node) is None
        if scheduler.tests_finished:
            for node in working:
                node.shutdown()
        if not working:
            return ran
    raise AssertionError(f"it never ends: {ran}, {nodes}")


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 5])
@pytest.mark.parametrize("alone", [[], ["z::1", "z::2"]])
def test_every_test_runs_once_and_those_that_run_alone_after_all_others_in_one_worker(
    num_nodes: int, alone: list[str]
) -> None:
    ran = run_all(*make_scheduler(num_nodes, alone))
    assert sorted(test for _, test in ran) == sorted(TESTS[: 5 + len(alone)])
    assert [test for _, test in ran][5:] == alone
    assert len({node for node, test in ran if test in alone}) == (1 if alone else 0)
    assert len({node for node, test in ran if test.startswith("m")}) == 1


def test_only_what_runs_alone_needs_one_worker_only() -> None:
    scheduler, nodes = make_scheduler(3, ["z::1"])
    scheduler.plan = None
    scheduler._make_plan = lambda tests: Plan(deque(), deque(["z::1"]))  # type: ignore[method-assign]
    for node in nodes:
        node.given, node.shutting_down, scheduler.queued[node] = [], False, []
    scheduler.schedule()
    assert [node.shutting_down for node in nodes] == [True, True, False]
    assert run_all(scheduler, nodes) == [("gw2", "z::1")]


def test_the_rest_of_a_crashed_worker_goes_to_the_others_and_what_it_ran_does_not() -> None:
    scheduler, (first, second) = make_scheduler(2, [])
    assert [TESTS[number] for number in first.given] == ["m::1", "m::2"]
    assert scheduler.remove_node(first) == "m::1"
    assert sorted(test for _, test in run_all(scheduler, [second])) == ["m::2", "m::3", "x::1", "y::1"]


@pytest.mark.parametrize(("other", "named"), [([*TESTS[:-1], "z::now"], "z::2"), (TESTS[::-1], "their order")])
def test_workers_that_collect_different_tests_are_told_which(other: list[str], named: str) -> None:
    scheduler, (_, second) = make_scheduler(2, [])
    scheduler.plan = None
    scheduler.add_node_collection(second, other)
    with pytest.raises(RuntimeError, match=named):
        scheduler.schedule()


MINI = """
import json, os, pytest, time

def note(name):
    own = {key: os.environ[key] for key in ("LLMCLOUD_ROOT", "LLMCLOUD_RUNTIME_DIR", "HOME", "JUPYTER_RUNTIME_DIR")}
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([name, os.environ.get("PYTEST_XDIST_WORKER", ""), own]) + "\\n")

@pytest.fixture(scope="module")
def shared():
    return os.getpid()

@pytest.mark.alone
def test_alone():
    note("alone")

@pytest.mark.parametrize("number", range(6))
def test_free(number):
    time.sleep(0.2)
    note(f"free{number}")

@pytest.mark.parametrize("number", range(3))
def test_together(shared, number):
    note(f"together{number}")
"""


@pytest.fixture
def mini(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Runs a small suite under the rules of this one, in processes of its own."""
    monkeypatch.setenv("PYTHONPATH", str(leaks.REPOSITORY))
    monkeypatch.setenv("NOTES", str(pytester.path / "notes"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makeconftest('pytest_plugins = ["tests.conftest"]')
    pytester.makeini("[pytest]\nmarkers =\n    alone\n    slow\n    browser")

    def run(source: str, workers: int) -> pytest.RunResult:
        pytester.makepyfile(test_mini=source)
        return pytester.runpytest_subprocess("-n", str(workers), "-q", timeout=120)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_run_ends_with_what_runs_alone_and_one_summary(
    mini: Callable[..., pytest.RunResult], pytester: pytest.Pytester, workers: int
) -> None:
    done = mini(MINI, workers)
    assert done.outlines[-1].startswith("10 passed")
    ran = [json.loads(line) for line in (pytester.path / "notes").read_text().splitlines()]
    assert ran[-1][0] == "alone"
    assert len({worker for name, worker, _ in ran if name.startswith("together")}) == 1
    if workers:
        assert {worker for name, worker, _ in ran if name.startswith("free")} == {"gw0", "gw1"}
    folders = {worker: own for _, worker, own in ran}
    for name in folders[ran[0][1]]:
        assert len({own[name] for own in folders.values()}) == max(1, workers), name
    assert not any(Path(own["HOME"]).exists() for own in folders.values())


CRASHES = """
import os, subprocess

def test_it():
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdout=-3, stderr=-3)
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{process.pid} {os.environ['HOME']}")
    os._exit(1)
"""


@pytest.mark.story
@pytest.mark.slow
def test_what_a_crashed_worker_has_left_is_ended_and_removed(
    mini: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    done = mini(CRASHES, 1)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert done.outlines[-1].startswith("1 failed")
    pid, home = (pytester.path / "notes").read_text().split()
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    assert not Path(home).exists()


WAITS = """
import os, signal, subprocess, sys

def test_it():
    wait = [sys.executable, "-c", "import signal; signal.pause()"]
    stopped = subprocess.Popen(wait, start_new_session=True, stdout=-3, stderr=-3)
    os.kill(stopped.pid, signal.SIGSTOP)
    with open(os.environ["NOTES"] + ".new", "w") as file:
        file.write(f"{stopped.pid} {os.environ['HOME']}")
    os.rename(os.environ["NOTES"] + ".new", os.environ["NOTES"])
    signal.pause()
"""


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_a_killed_pytest_has_left_is_ended_and_removed(
    mini: Callable[..., pytest.RunResult], pytester: pytest.Pytester, workers: str
) -> None:
    """Nobody cleans up in a process that gets SIGKILL; what it has started would live on, as agents are made to."""
    pytester.makepyfile(test_mini=WAITS)
    notes = pytester.path / "notes"
    with subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-n", workers], cwd=pytester.path) as killed:
        until(notes.exists, "the test has begun", 60)
        killed.kill()
    pid, home = notes.read_text().split()
    until(lambda: not alive(int(pid)), "what it has started has ended")
    until(lambda: not Path(home).parent.exists(), "its folder is removed")


def test_a_failed_test_leaves_the_logs_that_were_written_while_it_ran(tmp_path: Path) -> None:
    session = tmp_path / "session"
    (session / "root/runs").mkdir(parents=True)
    (session / "old.log").write_text("before")
    os.utime(session / "old.log", (1, 1))
    began = time.time() - 1
    (session / "root/runs/log").write_text("x" * (kept_logs.MAX_FILE + 5) + "the end")
    (session / "model.safetensors").write_bytes(b"weights")
    kept = kept_logs.keep("tests/agent/test_x.py::test_it[a place/b]", session, began, tmp_path / "kept")
    assert kept == tmp_path / "kept/agent-test_x.py-test_it-a-place-b"
    assert [str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()] == ["root/runs/log"]
    text = (kept / "root/runs/log").read_text()
    assert len(text) == kept_logs.MAX_FILE
    assert text.endswith("the end")


def test_the_logs_of_old_failures_go(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}").mkdir()
        os.utime(tmp_path / f"{number}", (number, number))
    kept_logs.prune(tmp_path, at_most=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    kept_logs.prune(tmp_path / "nowhere")


FAILING = """
import os, pathlib

def test_it():
    folder = pathlib.Path(os.environ["SESSION"], "root")
    folder.mkdir()
    (folder / "server.log").write_text("what went wrong")
    assert False, "broken"
"""
CONFTEST = """
import os, pathlib
from tests.support import kept_logs
from tests.support.session import FOLDER

pytest_plugins = ["tests.support.kept_logs"]
kept_logs.KEPT = pathlib.Path(os.environ["SESSION"], "kept")

def pytest_configure(config):
    config.stash[FOLDER] = pathlib.Path(os.environ["SESSION"])
"""


@pytest.mark.slow
def test_the_last_line_of_a_failure_says_where_its_logs_are(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = pytester.mkdir("session")
    monkeypatch.setenv("SESSION", str(session))
    monkeypatch.setenv("PYTHONPATH", str(leaks.REPOSITORY))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_mini=FAILING)
    done = pytester.runpytest_subprocess("-q", timeout=60)
    kept = session / "kept" / "test_mini.py-test_it"
    done.stdout.fnmatch_lines(["*broken*", "*logs of this test*", str(kept), "*short test summary*"], consecutive=False)
    assert (kept / "root/server.log").read_text() == "what went wrong"
