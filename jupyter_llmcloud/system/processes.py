"""Whether a process lives that was written down by its pid; a process that ends with the one that has started it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import psutil


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
