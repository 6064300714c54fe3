"""Processes: whether one lives that was written down by its pid, how one ends, what it may have open and holds."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import psutil

MOST_OPEN = 1 << 16  # programs that close everything they have not opened go through all numbers up to the limit


def is_process(pid: int, started: float) -> bool:
    """Whether the process with this pid is the one that started then (seconds since the epoch): pids are used again."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_with_parent(alive: int, folder: Path) -> None:
    """From now on end this process's whole group, and remove its folder, when whoever started it is gone.

    However that one ends, also by SIGKILL: its end of the pipe is then closed. A signal by prctl would reach this
    process alone, not what it has started, and leave nobody to remove the folder. This process must lead its group.

    Args:
        alive: the reading end of a pipe; the other end is open in the process that is watched, and nowhere else.
        folder: is of no use any more then.
    """

    def watch() -> None:
        while os.read(alive, 1):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def allow_many_open_files() -> int:
    """Raise the limit of this process, and of those it starts, as far as the system lets it; returns it.

    A shell's is often 1,024: an agent that leads 400 ranks has two journals and a connection for each.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN if hard == resource.RLIM_INFINITY else min(MOST_OPEN, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    with contextlib.suppress(OSError, ValueError):  # where the system allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def give_back_memory() -> None:
    """Give the pages that the C library keeps for later allocations back to the kernel; nothing where it cannot."""
    import ctypes  # two hundred kilobytes, of a notebook's kernel that does not ask for this

    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
