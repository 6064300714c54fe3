"""How much processor time each test takes with all that it starts: --cpu-times FILE. A plugin of pytest, for Linux.

On two cores the suite takes at least half of the sum, whatever it waits for. Every process that runs tests is put into
a control group of its own, in which all stays that descends from it, also what outlives its parent; that needs the
right to make one (as root). Each line of FILE is one phase of one test: its seconds by the clock and of processors.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.session import is_worker

ROOTS = (Path("/sys/fs/cgroup/cpuacct"), Path("/sys/fs/cgroup"))
OPTION = "--cpu-times"
SHOWN = 40

_group = pytest.StashKey[Path]()


def usage_s(group: Path) -> float:
    """What the group has used since it was made."""
    if (total := group / "cpuacct.usage").exists():
        return int(total.read_text()) / 1e9
    rows = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
    return int(rows["usage_usec"]) / 1e6


def enter_group() -> Path:
    """Put this process into a new group below the one that it is in."""
    root = next(path for path in ROOTS if (path / "cgroup.procs").exists())
    names = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    controller = "cpuacct" if root.name == "cpuacct" else ""
    own = next(path for _, controllers, path in names if controller in controllers.split(","))
    group = root / own.lstrip("/") / f"llmc-tests-{os.getpid()}"
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    os.environ["LLMCLOUD_TEST_GROUP"] = str(group / "cgroup.procs")  # for zygotes that are forked elsewhere
    return group


def leave_group(group: Path) -> None:
    """Back to where this process came from; what it has left in the group ends with the tests, and the group later."""
    (group.parent / "cgroup.procs").write_text(str(os.getpid()))
    with contextlib.suppress(OSError):
        group.rmdir()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, metavar="FILE", help="write the processor time of each test, with all that it starts")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(OPTION) and (is_worker(config) or not config.getoption("numprocesses", None)):
        config.stash[_group] = enter_group()


def pytest_unconfigure(config: pytest.Config) -> None:
    if group := config.stash.get(_group, None):
        leave_group(group)


@contextlib.contextmanager
def _measured(item: pytest.Item, phase: str) -> Iterator[None]:
    group = item.config.stash.get(_group, None)
    if group is None:
        yield
        return
    began, used = time.monotonic(), usage_s(group)
    try:
        yield
    finally:
        row = {
            "test": item.nodeid,
            "phase": phase,
            "wall_s": round(time.monotonic() - began, 3),
            "cpu_s": round(usage_s(group) - used, 3),
        }
        with Path(item.config.getoption(OPTION)).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")  # one write: workers share the file


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with _measured(item, "setup"):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with _measured(item, "call"):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with _measured(item, "teardown"):
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not (name := config.getoption(OPTION)) or not Path(name).exists():
        return
    cpu, wall = Counter[str](), Counter[str]()
    for row in map(json.loads, Path(name).read_text(encoding="utf-8").splitlines()):
        for key in (row["test"], row["test"].split("::")[0]):
            cpu[key] += row["cpu_s"]
            wall[key] += row["wall_s"]
    files = [key for key in cpu if "::" not in key]
    terminalreporter.section(f"processor time: {sum(cpu[key] for key in files):.0f} s")
    for keys in (files, [key for key in cpu if "::" in key]):
        for key in sorted(keys, key=lambda key: -cpu[key])[:SHOWN]:
            terminalreporter.line(f"{cpu[key]:8.1f} s of {wall[key]:6.1f} s  {key}")
