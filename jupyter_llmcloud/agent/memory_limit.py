"""The memory that a process was promised, as a limit: what takes more is ended, and it is said what it was.

Where the kernel can keep the limit (`system.cgroup`) it does. Elsewhere the processes are looked at: what they have
resident is an upper bound, and only beyond the limit is it asked for what shared pages come to.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import psutil

from jupyter_llmcloud.system.cgroup import MemoryGroup

EVERY_S = 0.25


def taken_by(pid: int, limit: int) -> int:
    """Bytes that a process and its children have: exact only beyond `limit`, an upper bound below it."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    resident = sum(_read(member, lambda one: one.memory_info().rss) for member in family)
    if resident <= limit:
        return resident
    return sum(_read(member, lambda one: one.memory_full_info().pss) for member in family)


def _read(process: psutil.Process, read: Callable[[psutil.Process], int]) -> int:
    try:
        return int(read(process))
    except psutil.Error:
        return 0


class MemoryLimit:
    """Keeps one process within its limit.

    Attributes:
        reason: why it was ended; "" as long as it was not, by its memory.
    """

    def __init__(self, name: str, limit: int, option: str = "--memory") -> None:
        self.reason = ""
        self._limit = limit
        self._said = f"{option} allows {limit / 2**30:.3g}GiB"
        self._group = MemoryGroup.make(f"llmcloud-{name}", limit)

    async def keep(self, pid: int) -> None:
        """Until the process has ended; it is killed, with its children, when it takes more."""
        if self._group is not None and not self._group.add(pid):
            self._group.remove()
            self._group = None
        while self._group is None and psutil.pid_exists(pid):
            if (taken := await asyncio.to_thread(taken_by, pid, self._limit)) > self._limit:
                self.reason = f"it took {taken / 2**30:.3g} GiB of memory, and {self._said}: it was ended"
                _kill(pid)
                return
            await asyncio.sleep(EVERY_S)

    def ended(self) -> None:
        """The process has ended: was it by the kernel, for its memory?"""
        if self._group is not None:
            if self._group.num_killed() and not self.reason:
                self.reason = f"it took more memory than it may: {self._said}, and the kernel ended it"
            self._group.remove()


def _kill(pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                member.kill()
