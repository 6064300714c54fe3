"""Zygotes of tests are forked from one that has imported all already; nobody can tell them from those that were not."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import leaks
from tests.support.worlds import AgentProcess, Ranks, alive, until

STAND_IN = Path(__file__).parents[1] / "support/preloaded/stand_in.py"


@contextlib.contextmanager
def started(folder: Path) -> Iterator[tuple[Ranks, psutil.Process, psutil.Process]]:
    """Ranks, the process that their agent has started for a zygote, and the zygote they were forked from."""
    agent = AgentProcess(2, env={"LLMCLOUD_TEST_PRELOADED": str(folder), "MARKED": "by the test"})
    try:
        world = Ranks(agent)
        world.ok("import os\nzygote = os.getppid()")
        [child] = psutil.Process(agent.process.pid).children()
        yield world, child, psutil.Process(world.pull("zygote", 0))
        world.end()
    finally:
        agent.end()


def test_the_second_zygote_is_forked_from_one_that_has_imported_all(tmp_path: Path) -> None:
    with started(tmp_path) as (_, child, zygote):
        assert child == zygote
    with started(tmp_path) as (world, child, zygote):
        assert child != zygote
        assert zygote.cmdline()[1:3] == ["-m", "jupyter_llmcloud.training.zygote"]
        assert zygote.environ() == child.environ() and zygote.cwd() == child.cwd()
        assert zygote.environ()[leaks.MARK] == os.environ[leaks.MARK] and zygote.environ()["MARKED"] == "by the test"
        world.ok("import os, sys\nassert os.environ['MARKED'] == 'by the test' and 'tests' not in sys.modules")
        rank = psutil.Process(world.pids()[0])
        os.kill(child.pid, signal.SIGKILL)
        until(lambda: not alive(zygote.pid) and not alive(rank.pid), "what it stood for ends with it")
    with started(tmp_path) as (_, child, zygote):
        zygote.kill()
        until(lambda: not alive(child.pid), "it ends with what it stands for")


@pytest.mark.parametrize(
    ("name", "is_same"), [("LLMCLOUD_LEASE_S", True), ("TORCH_HOME", False), ("PYTHONPATH", False)]
)
def test_what_imports_may_read_decides_from_which_process_a_zygote_is_forked(name: str, is_same: bool) -> None:
    key_of = runpy.run_path(str(STAND_IN))["key_of"]
    env = dict(os.environ)
    assert (key_of(env) == key_of({**env, name: "other"})) is is_same
