"""How much memory this process has and could still have, of its host and of its container."""

from __future__ import annotations

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")  # of a container with a namespace of its own; a host's root has no limit


def resident() -> int:
    """Resident memory of this process in bytes; 0 where that cannot be told."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def available(meminfo: Path = MEMINFO, group: Path = CONTROL_GROUP) -> int:
    """Bytes that can be had without swapping, before a limit is met; 0 where that cannot be told."""
    try:
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        left = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return 0
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # a cache gives way
            left = min(left, max(0, int(limit) - used))
    except (OSError, KeyError, ValueError):
        pass  # no control group, or of another version
    return left
