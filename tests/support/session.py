"""What a process that runs tests knows of itself: its folder, and the mark of what its tests start.

With pytest-xdist the tests run in workers, and a process that runs none of them starts those and outlives them. Folders
and marks of workers begin with its own: whatever happens to a worker, it finds what was left.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

SHARED_MEMORY = "/dev/shm"
ENOUGH_MEMORY = 16 << 30
FOLDER = pytest.StashKey[Path]()  # below which its tests write; each worker has one of its own


def is_worker(config: pytest.Config) -> bool:
    """Whether this process runs tests for another pytest."""
    return hasattr(config, "workerinput")


def make_folder(config: pytest.Config) -> Path:
    """Make the folder of this process. Its path is short, since that of a unix socket holds 107 bytes."""
    if not is_worker(config):
        return Path(tempfile.mkdtemp(prefix="llmc-", dir=_where()))
    given: dict[str, Any] = config.workerinput
    folder = Path(f"{given['folder']}-{given['workerid'].removeprefix('gw')}")
    folder.mkdir(mode=0o700)
    return folder


def _where() -> str | None:
    """In memory where there is plenty: tens of thousands of small files are made, synced and removed."""
    with contextlib.suppress(OSError):
        if min(psutil.disk_usage(SHARED_MEMORY).free, psutil.virtual_memory().available) > ENOUGH_MEMORY:
            return SHARED_MEMORY
    return "/tmp" if os.path.isdir("/tmp") else None


def mark_of(config: pytest.Config) -> str:
    """What the marks of all processes begin with that tests of this process start, or its workers'."""
    return f"{config.stash[FOLDER].name.removeprefix('llmc-')}{':' if is_worker(config) else ''}"
