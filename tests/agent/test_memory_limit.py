"""--memory is a limit that is kept: a process that takes more is ended, and it is said what it was."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from jupyter_llmcloud.agent import memory_limit
from jupyter_llmcloud.agent.memory_limit import MemoryLimit
from jupyter_llmcloud.system.cgroup import MemoryGroup

MIB = 1 << 20
# A parent that waits for a child, which takes memory as it is told to.
TAKES = """
import subprocess, sys
child = "import sys\\nheld = b'x' * {num_bytes}\\nprint('has it', flush=True)\\nsys.stdin.read()"
process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE)
sys.stdin.read()
process.stdin.close()
"""


class NoGroups:
    """As where the kernel does not keep limits for us: the processes are looked at."""

    @staticmethod
    def make(name: str, limit: int) -> None:
        return None


@pytest.fixture(autouse=True)
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "MemoryGroup", NoGroups)


async def kept(num_bytes: int, limit: int) -> tuple[str, int | None]:
    """Why a process that takes so much was ended, and with what status; with None, and alive, when it may."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", TAKES.format(num_bytes=num_bytes), stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    told = MemoryLimit("r", limit)
    keeping = asyncio.create_task(told.keep(process.pid))
    said = await asyncio.wait_for(process.stdout.readline(), 60)
    try:
        if said and not told.reason:
            await asyncio.wait([keeping], timeout=4 * memory_limit.EVERY_S)
        return told.reason, process.returncode if keeping.done() else None
    finally:
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 60)
        keeping.cancel()
        told.ended()


async def test_a_process_that_takes_more_with_its_children_is_ended_and_it_is_said() -> None:
    reason, _ = await kept(300 * MIB, 100 * MIB)
    assert "GiB of memory, and --memory allows 0.0977GiB: it was ended" in reason


async def test_a_process_within_its_limit_lives_on() -> None:
    assert await kept(10 * MIB, 400 * MIB) == ("", None)


def groups(tmp_path: Path, line: str, given: str = "cpu memory") -> Path:
    """A file system of control groups, as far as files can stand for it."""
    root = tmp_path / "cgroup"
    (root / "user/session").mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu memory")
    (root / "user/cgroup.subtree_control").write_text(given)
    (tmp_path / "own").write_text(line)
    return root


def make(tmp_path: Path, root: Path) -> MemoryGroup | None:
    return MemoryGroup.make("llmcloud-r", 5 * MIB, root, tmp_path / "own")


def test_a_group_is_made_beside_that_of_the_agent_and_says_whom_the_kernel_has_killed(tmp_path: Path) -> None:
    group = make(tmp_path, groups(tmp_path, "0::/user/session\n"))
    assert group is not None and group.path == tmp_path / "cgroup/user/llmcloud-r"
    assert (group.path / "memory.max").read_text() == str(5 * MIB)
    assert (group.path / "memory.oom.group").read_text() == "1"
    assert group.add(123) and (group.path / "cgroup.procs").read_text() == "123"
    assert group.num_killed() == 0
    (group.path / "memory.events").write_text("low 0\noom 2\noom_kill 3\n")
    assert group.num_killed() == 3


@pytest.mark.parametrize(
    ("line", "given"), [("4:memory:/x\n", "memory"), ("0::/user/session\n", "cpu"), ("0::/gone/deep\n", "memory")]
)
def test_where_the_kernel_does_not_keep_limits_there_is_no_group(tmp_path: Path, line: str, given: str) -> None:
    root = groups(tmp_path, line, given)
    assert make(tmp_path, root) is None
    assert not [*root.rglob("llmcloud-*")]
