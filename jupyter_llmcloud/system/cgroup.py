"""A memory limit that the kernel keeps: a control group (version 2) of a process's own, where this user may make one.

https://docs.kernel.org/admin-guide/cgroup-v2.html. A group that holds processes can have no children with controllers,
so the new one is made beside that of this process: possible below a user's systemd session, or in a container that
delegates its groups.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


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
