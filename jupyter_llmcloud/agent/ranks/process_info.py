"""A rank's process seen from outside, which needs nothing of it: state, processor time, stacks, the killer's trace."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

from jupyter_llmcloud.core.run.exits import oom_evidence
from jupyter_llmcloud.system.cgroup import memory_groups

DUMP_NAME = "llmcloud-stacks"  # the memory file into which a rank's SIGUSR1 writes
MAX_DUMP = 256 << 10


def state(pid: int) -> tuple[str, float]:
    """(state letter, processor seconds) as in /proc; ("", 0.0) when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0.0
    return fields[0], sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class StackDump:
    """Asks a process for its stacks by a signal that its C code answers; `read` some moments later.

    The signal goes to the side thread that owns the memory file, so that it interrupts no system call of the others.
    """

    def __init__(self, pid: int) -> None:
        self._path, thread = _memory_file(pid)
        self._start = 0
        self.cpu_s = state(pid)[1]
        import ctypes  # two hundred kilobytes, of an agent that hardly ever asks

        if self._path is not None:
            with contextlib.suppress(OSError):
                self._start = os.stat(self._path).st_size
            ctypes.CDLL(None).tgkill(pid, thread, int(signal.SIGUSR1))

    def read(self) -> str:
        """What it has written; "" when it could not."""
        if self._path is None:
            return ""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._start)
                return file.read(MAX_DUMP).decode("utf-8", "replace")
        except OSError:
            return ""


def _memory_file(pid: int) -> tuple[str | None, int]:
    """The path of the file and the thread that its name tells."""
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                if match := re.search(rf"{DUMP_NAME}-(\d+)", os.readlink(f"{folder}/{name}")):
                    return f"{folder}/{name}", int(match[1])
    return None, 0


class MemoryEvidence:
    """Was a process killed for want of memory? Made while it lives, asked when it has gone."""

    def __init__(self, pid: int) -> None:
        self.rss = 0
        self._pid = pid
        self._files = _oom_files(pid)
        self._before = _oom_kills(self._files)

    def of_death(self, status: int) -> str:
        """A sentence for an exit by SIGKILL, "" when nothing speaks for the killer."""
        if status != -signal.SIGKILL:
            return ""
        return oom_evidence(self._before, _oom_kills(self._files), _kernel_line(self._pid), self.rss)


def _oom_files(pid: int) -> list[Path]:
    """The files that count kills in the memory cgroup of a process, of either version of cgroups."""
    names = {"cgroup2": "memory.events", "cgroup": "memory.oom_control"}
    found = [folder / names[version] for version, _, folder in memory_groups(pid)]
    return [file for file in found if os.access(file, os.R_OK)]


def _oom_kills(files: list[Path]) -> int:
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            counts = dict(line.split()[:2] for line in file.read_text().splitlines() if " " in line)
            total += int(counts.get("oom_kill", 0))
    return total


def _kernel_line(pid: int) -> str:
    """What the kernel's log says of the kill; "" where it may not be read."""
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    found = ""
    try:
        while True:
            try:
                text = os.read(log, 8192).decode("utf-8", "replace")
            except BrokenPipeError:
                continue  # older lines were overwritten meanwhile
            except OSError:
                return found
            if f"Killed process {pid} " in text or f"Kill process {pid} " in text:
                found = text.partition(";")[2].splitlines()[0].strip()
    finally:
        os.close(log)
