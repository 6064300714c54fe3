"""Control groups: what memory their limits leave to a process, and a group with a limit where this user may make one.

https://docs.kernel.org/admin-guide/cgroup-v2.html. A group (of version 2) that holds processes can have no children
with controllers, so the new one is made beside that of this process: possible below a user's systemd session, or in a
container that delegates its groups.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")
_OWN = Path("/proc/self/cgroup")
_FILES = {  # by version: limit, usage, of its statistics what gives way
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_NO_LIMIT = 1 << 60  # and more: how version 1 writes that there is none


def memory_groups(pid: int | str = "self", proc: Path = PROC) -> list[tuple[str, Path, Path]]:
    """The memory groups of a process: the version, where its groups are mounted, the folder of this one."""
    try:
        rows = [line.split(":", 2) for line in (proc / str(pid) / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "self" / "mountinfo").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for mount in mounts:
        kind, options, root, point = mount[mount.index("-") + 1], mount[-1].split(","), mount[3], Path(mount[4])
        for number, controllers, path in rows:
            of_memory = "memory" in options and "memory" in controllers.split(",")
            if (kind == "cgroup2" and number == "0") or (kind == "cgroup" and of_memory):
                inside = os.path.relpath(path, root) if path.startswith(root) else path.lstrip("/")
                found.append((kind, point, point / inside))
    return found


def memory_left(proc: Path = PROC) -> int | None:
    """Bytes until a limit is met of the groups of this process, or of those above them; None where there is none."""
    found = []
    for version, point, folder in memory_groups(proc=proc):
        for group in (folder, *folder.parents):
            if group.is_relative_to(point) and (left := _left(group, *_FILES[version])) is not None:
                found.append(left)
    return min(found, default=None)


def _left(group: Path, limit_file: str, usage_file: str, cache: str) -> int | None:
    try:
        limit = (group / limit_file).read_text().strip()
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return None
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / usage_file).read_text()) - int(statistics[cache])  # a cache gives way
        return max(0, int(limit) - used)
    except (OSError, KeyError, ValueError):
        return None  # the group that is no part of a container, or of another kernel


class MemoryGroup:
    """A control group with a limit. What is put into it, and what that starts, has so much memory together."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, name: str, limit: int, root: Path = ROOT, own: Path = _OWN) -> MemoryGroup | None:
        """A new group; None where that is not possible, and nothing is left behind then.

        Args:
            name: of the group, unused so far.
            limit: bytes.
            root: where the file system of control groups is mounted; `own`: the file that names that of this process.
        """
        parent = _parent(root, own)
        if parent is None:
            return None
        group = cls(parent / name)
        try:
            group.path.mkdir()
            (group.path / "memory.max").write_text(str(limit))
            with contextlib.suppress(OSError):  # there is none without swap
                (group.path / "memory.swap.max").write_text("0")
            (group.path / "memory.oom.group").write_text("1")
        except OSError:
            group.remove()
            return None
        return group

    def add(self, pid: int) -> bool:
        """Put a process into it; whether that was possible."""
        try:
            (self.path / "cgroup.procs").write_text(str(pid))
        except OSError:
            return False
        return True

    def num_killed(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        with contextlib.suppress(OSError, ValueError):
            for line in (self.path / "memory.events").read_text().splitlines():
                name, _, number = line.partition(" ")
                if name == "oom_kill":
                    return int(number)
        return 0

    def remove(self) -> None:
        """Give it up; its processes have ended."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def _parent(root: Path, own: Path) -> Path | None:
    """The group in which one with a memory limit can be made."""
    try:
        lines = own.read_text().splitlines()
        line = next((line for line in lines if line.startswith("0::/")), None)
        if line is None or not (root / "cgroup.controllers").is_file():
            return None
        group = root / line.removeprefix("0::/")
        parent = group.parent if group != root else root
        given = (parent / "cgroup.subtree_control").read_text().split()
    except OSError:
        return None
    return parent if "memory" in given else None
