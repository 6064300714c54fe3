"""How much memory this process has and could still have: of its host, of its container, and of its GPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch

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


def of_device() -> tuple[int, int]:
    """Bytes that torch has taken of this rank's GPU, and that are left there; zeros where none is used."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0, 0
    device = int(os.environ.get("LOCAL_RANK", "0"))  # a thread has a current device of its own
    try:
        return torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]
    except RuntimeError:  # the device has failed, of which the main thread tells
        return 0, 0
