"""Processes that go on by themselves, with a log: node agents, host processes of clusters, servers, zygotes."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

MAX_TAIL_BYTES = 2000  # bytes
_started: list[subprocess.Popen[bytes]] = []  # forgetting one that lives would warn


def spawn(
    command: Sequence[str],
    log: Path,
    *,
    fresh_log: bool = False,
    takes_input: bool = False,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which no signal to this one's group and no closed terminal reaches.

    Args:
        log: takes what it prints; nobody but this user can read it.
        fresh_log: forget what an earlier process left in the log.
        takes_input: have its standard input be a pipe from here, and not empty.
    """
    with open_log(log, fresh=fresh_log) as fd:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if takes_input else subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            env=env,
            cwd=cwd,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    _started[:] = [other for other in _started if other.poll() is None]
    _started.append(process)
    return process


@contextlib.contextmanager
def open_log(path: Path, *, fresh: bool = False) -> Iterator[int]:
    """A descriptor of a log for a process that is started within the block."""
    fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0), 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def log_tail(log: Path) -> str:
    """The end of a log, "" when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_TAIL_BYTES))
            return file.read(MAX_TAIL_BYTES).decode(errors="replace").strip()
    except OSError:
        return ""
