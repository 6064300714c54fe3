"""Whether a process lives that was written down by its pid."""

from __future__ import annotations

import psutil


def is_process(pid: int, started: float) -> bool:
    """Whether the process with this pid is the one that started then (seconds since the epoch): pids are used again."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
