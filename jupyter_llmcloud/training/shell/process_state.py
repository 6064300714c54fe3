"""State of the whole process, which outlives a cell: what is taken back after it, and what a fresh one does without."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.integrations.library_state import LibraryState
from jupyter_llmcloud.training.shell.isolation import Isolation

GRACE_S = 1.0  # for a child to obey an interrupt
TICKS = os.sysconf("SC_CLK_TCK")  # a second: the resolution of what the system says of a process's start


class ProcessState:
    """That of a rank, from cell to cell."""

    def __init__(self) -> None:
        self._libraries = LibraryState()
        self._isolation = Isolation()
        self._began = 0.0

    def install(self) -> None:
        """Take the present state as the one that cells begin with. Called once, in a rank."""
        self._libraries.install()
        self._isolation.install()

    def set_environment(self, values: Mapping[str, str]) -> None:
        """What the world says to its ranks; every cell finds it."""
        self._isolation.set_environment(values)

    def begin(self, cell: Execute, namespace: dict[str, Any], initial_names: set[str]) -> None:
        """A cell is about to be executed in `namespace`; `initial_names` of it are no cell's."""
        self._began = time.clock_gettime(time.CLOCK_BOOTTIME)
        if cell.fresh:
            self._isolation.begin(namespace, initial_names)

    def interrupt_children(self) -> None:
        """The cell was stopped, and so are processes that it has started: in a notebook, too, Stop is for all of them.

        Workers of loaders and pools stay: they end with their owner, a variable that the next cell may use.
        """
        workers = {child.pid for child in _of_multiprocessing() if child.daemon}
        own = [child for child in _of_multiprocessing() if not child.daemon and child.pid is not None]
        for child in _in_own_group(self._began):
            if child.pid not in workers:
                with contextlib.suppress(psutil.Error):
                    child.send_signal(signal.SIGINT)
        new = [child for child in own if _has_begun_since(self._began, child.pid)]
        if new:
            threading.Thread(target=_end, args=(new,), name="llmcloud-children", daemon=True).start()

    def end(self, namespace: dict[str, Any]) -> None:
        """It has ended, in whatever way."""
        self._libraries.take_back()
        self._isolation.end(namespace)


def _of_multiprocessing() -> Iterator[Any]:
    """Processes that the standard library's module has started, and those of its copy that `datasets` uses."""
    yield from multiprocessing.active_children()
    if (copy := sys.modules.get("multiprocess")) is not None:
        yield from copy.active_children()


def _in_own_group(since: float) -> list[psutil.Process]:
    """Children that have not set themselves apart, as servers do, and were started since then."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError):
            if _has_begun_since(since, child.pid) and os.getpgid(child.pid) == os.getpgid(0):
                found.append(child)
    return found


def _has_begun_since(time_s: float, pid: int) -> bool:
    """Whether a process was started after this time since boot; psutil's times are only right to a second."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return (int(stat.rpartition(")")[2].split()[19]) + 1) / TICKS >= time_s


def _end(children: list[Any]) -> None:
    """Those that wait in native code, where they hear no interrupt."""
    deadline = time.monotonic() + GRACE_S
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()
