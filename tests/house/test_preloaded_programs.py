"""Programs of tests are forked from one that has imported all already; nobody can tell them from those that were not."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import leaks
from tests.support.portrait import COMPARED
from tests.support.worlds import ORDINARY, AgentProcess, Ranks, alive, until

STAND_IN = Path(__file__).parents[1] / "support/preloaded/stand_in.py"


TOLD = "LLMCLOUD_TEST_TOLD"  # of those variables that the mothers' forks may have as they like


@contextlib.contextmanager
def started() -> Iterator[tuple[Ranks, psutil.Process, psutil.Process]]:
    """Ranks, the process that their agent has started for a zygote, and the zygote they were forked from."""
    agent = AgentProcess(2, env={TOLD: "by the test"})
    try:
        world = Ranks(agent)
        world.ok("import os\nzygote = os.getppid()")
        [child] = psutil.Process(agent.process.pid).children()
        yield world, child, psutil.Process(world.pull("zygote", 0))
        world.end()
    finally:
        agent.end()


def test_a_zygote_is_forked_from_one_that_has_imported_all() -> None:
    with started() as (world, child, zygote):
        assert child != zygote
        assert zygote.cmdline()[1:3] == ["-m", "jupyter_llmcloud.training.zygote"]
        assert zygote.environ() == child.environ() and zygote.cwd() == child.cwd()
        assert zygote.environ()[leaks.MARK] == os.environ[leaks.MARK] and zygote.environ()[TOLD] == "by the test"
        world.ok(f"import os, sys\nassert os.environ['{TOLD}'] == 'by the test' and 'tests' not in sys.modules")
        rank = psutil.Process(world.pids()[0])
        os.kill(child.pid, signal.SIGKILL)
        until(lambda: not alive(zygote.pid) and not alive(rank.pid), "what it stood for ends with it")
    with started() as (_, child, zygote):
        zygote.kill()
        until(lambda: not alive(child.pid), "it ends with what it stands for")


@contextlib.contextmanager
def portrait(folder: Path, *options: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The program of this name, and what it tells; with an argument, and a descriptor that is not a standard one."""
    read, write = os.pipe()
    command = [sys.executable, *options, "-m", "tests.support.portrait", "an argument"]
    given = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": leaks.REPOSITORY, "pass_fds": (read,)}
    process = subprocess.Popen(
        command,
        env={**os.environ, "LLMCLOUD_TEST_PRELOADED": str(folder), **env},
        text=True,
        start_new_session=True,
        **given,
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        print("a line", file=process.stdin, flush=True)
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("options", [(), ("-P",), ("-X", "utf8")], ids=["plain", "safe path", "an option"])
def test_a_program_that_is_forked_finds_what_one_that_is_started_finds(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    with portrait(tmp_path, *options, **{ORDINARY: "1"}) as (process, started):
        assert started["pid"] == process.pid
        del started["environ"][ORDINARY]
    with portrait(tmp_path, *options) as (process, forked):
        assert forked["pid"] != process.pid
        assert {name: forked[name] for name in COMPARED} == {name: started[name] for name in COMPARED}


def test_signals_and_ends_go_through_both_ways(tmp_path: Path) -> None:
    with portrait(tmp_path) as (process, first), portrait(tmp_path) as (other, second):
        assert first["draws"] != second["draws"] and {first["pid"], second["pid"]}.isdisjoint({process.pid, other.pid})
        process.terminate()
        assert process.wait(20) == 5
        os.kill(second["pid"], signal.SIGUSR1)
        assert other.wait(20) == -signal.SIGUSR1
    with portrait(tmp_path) as (process, told):
        process.kill()
        until(lambda: not alive(told["pid"]), "it ends with what stands for it")


def test_what_is_unlike_the_first_of_its_kind_is_started_the_first_time(tmp_path: Path) -> None:
    are_forked = []
    for mark in ("", "", "other", "other"):
        with portrait(tmp_path, **({"ANOTHER": mark} if mark else {})) as (process, told):
            are_forked.append(told["pid"] != process.pid)
    assert are_forked == [True, True, False, True]


@pytest.mark.parametrize(
    ("name", "is_same"), [("LLMCLOUD_LEASE_S", True), ("TORCH_HOME", False), ("PYTHONPATH", False)]
)
def test_what_imports_may_read_decides_from_which_process_a_zygote_is_forked(
    monkeypatch: pytest.MonkeyPatch, name: str, is_same: bool
) -> None:
    monkeypatch.syspath_prepend(STAND_IN.parent)
    key_of = runpy.run_path(str(STAND_IN))["key_of"]
    env = dict(os.environ)
    assert (key_of(env) == key_of({**env, name: "other"})) is is_same
