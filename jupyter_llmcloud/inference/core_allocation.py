"""The cores of a host, shared out over the replicas that run there, whichever agents have started them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from jupyter_llmcloud.system.processes import is_process


def cores_for(num_cores: int, fixed: list[int], num_sharing: int) -> int:
    """The threads of a replica that shares; one core is left to HTTP and to whoever else is there.

    Args:
        num_cores: of the host, as far as replicas may use them.
        fixed: threads of the replicas that were given a number of their own.
        num_sharing: the other ones.
    """
    return max(1, (num_cores - 1 - sum(fixed)) // max(1, num_sharing))


def claim_cores(folder: Path, number: int) -> list[int]:
    """Cores of this host that no other replica has, for as long as this process lives; fewer when there are no more.

    The process, and what it starts, runs on them from now on. Call it before torch is imported.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    claimed: list[int] = []
    for core in sorted(os.sched_getaffinity(0)):
        if len(claimed) == number:
            break
        descriptor = os.open(folder / str(core), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
        else:
            claimed.append(core)  # the lock goes with the process
    if claimed:
        os.sched_setaffinity(0, claimed)
    return claimed


class CoreAllocation:
    """One replica among those of its host: a file says that it is there, and how many threads it was given.

    Args:
        folder: the same for all replicas of this user on this host.
        num_threads: a number of its own; None: it shares.
    """

    def __init__(self, folder: Path, num_threads: int | None = None) -> None:
        self._folder = folder
        self._fixed = num_threads
        self._file: Path | None = None

    def join(self) -> None:
        """Be counted from now on, until this process ends or `leave`."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = self._folder / f"{os.getpid()}_{psutil.Process().create_time()!r}_{self._fixed or 0}"
        self._file.touch(mode=0o600)

    def leave(self) -> None:
        """Be counted no longer."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def num_threads(self) -> int:
        """How many threads this replica shall use now."""
        if self._fixed is not None:
            return self._fixed
        there = list(self._living())
        fixed = [number for number in there if number]
        return cores_for(len(os.sched_getaffinity(0)), fixed, len(there) - len(fixed))

    def _living(self) -> Iterator[int]:
        """The threads of each replica that lives, 0 for one that shares; what is left of dead ones is removed."""
        for file in self._folder.iterdir():
            with contextlib.suppress(ValueError):
                pid, started, number = file.name.split("_")
                if is_process(int(pid), float(started)):
                    yield int(number)
                else:
                    file.unlink(missing_ok=True)
