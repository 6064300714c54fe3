"""How much memory this process has and could still have: of its host, of its container or job, and of its GPU."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from jupyter_llmcloud.system import cgroup

_LIMITS = ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5))  # and where statm has the pages that count


def resident() -> int:
    """Resident memory of this process in bytes; 0 where that cannot be told."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def available(proc: Path = cgroup.PROC) -> int:
    """Bytes that can be had without swapping, before a limit of a control group is met; 0 where that cannot be told."""
    try:
        rows = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
        left = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return 0
    in_group = cgroup.memory_left(proc)
    return left if in_group is None else min(left, in_group)


def before_limits() -> list[int]:
    """Bytes that `ulimit` leaves to this process alone, for each limit that there is."""
    try:
        with open("/proc/self/statm", "rb") as file:
            pages = [int(number) for number in file.read().split()]
    except OSError:
        return []
    limits = [(resource.getrlimit(kind)[0], pages[at] * os.sysconf("SC_PAGE_SIZE")) for kind, at in _LIMITS]
    return [max(0, limit - taken) for limit, taken in limits if limit != resource.RLIM_INFINITY]


def of_device() -> tuple[int, int]:
    """Bytes that torch has taken of this rank's GPU, and that are left there; zeros where none is used."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0, 0
    device = int(os.environ.get("LOCAL_RANK", "0"))  # a thread has a current device of its own
    try:
        return torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]
    except RuntimeError:  # the device has failed, of which the main thread tells
        return 0, 0
