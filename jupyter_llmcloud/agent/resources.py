"""What this agent's host and processes take: cores, memory, devices. Looked at only when somebody asks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from jupyter_llmcloud.agent.gpus import GpuStats
from jupyter_llmcloud.agent.ranks.process_info import state
from jupyter_llmcloud.protocol.agent_messages import AgentResources

KEEP_S = 0.5  # several who ask at once are answered by one look
PSS_EVERY_S = 10.0  # the kernel walks the whole memory of a process for it


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A process of this agent.

    Attributes:
        kind: rank, replica, agent or zygote.
        device: index of the GPU that it uses.
    """

    pid: int
    kind: str
    world_id: str = ""
    rank: int | None = None
    endpoint: str = ""
    replica_id: str = ""
    device: int | None = None


@dataclass
class _Known:
    """Of one process: processor seconds at a time, and what its memory comes to when shared pages are shared out."""

    cpu_s: float
    at: float
    shared: int = 0  # bytes of its resident memory that count for others
    shared_at: float = float("-inf")


class ResourceMonitor:
    """Looks at the processes that `processes` names."""

    def __init__(self, processes: Callable[[], Iterable[Ours]], gpus: GpuStats) -> None:
        self._processes = processes
        self._gpus = gpus
        self._known: dict[int, _Known] = {}
        self._last: AgentResources | None = None
        self._last_at = float("-inf")
        self._guard = asyncio.Lock()
        psutil.cpu_percent()  # from here on it tells the load since it was asked last

    async def describe(self) -> AgentResources:
        """All of it now."""
        async with self._guard:
            if self._last is None or time.monotonic() - self._last_at >= KEEP_S:
                self._last = await asyncio.to_thread(self._look, list(self._processes()))
                self._last_at = time.monotonic()
            return self._last

    def _look(self, processes: list[Ours]) -> AgentResources:
        devices, gpu_memory = self._gpus.read()
        memory = psutil.virtual_memory()
        rows = [row for process in processes if (row := self._row(process, gpu_memory)) is not None]
        self._known = {process.pid: self._known[process.pid] for process in processes if process.pid in self._known}
        return AgentResources(
            host=socket.gethostname(),
            t=time.time(),
            num_cores=os.cpu_count() or 1,
            cpu=psutil.cpu_percent() / 100,
            memory_bytes=memory.total - memory.available,
            total_memory_bytes=memory.total,
            devices=devices,
            processes=rows,
        )

    def _row(self, process: Ours, gpu_memory: dict[int, int]) -> dict[str, Any] | None:
        letter, cpu_s = state(process.pid)
        if letter in ("", "Z"):
            return None
        row = {name: value for name, value in vars(process).items() if value not in ("", None)}
        now = time.monotonic()
        known = self._known.setdefault(process.pid, _Known(cpu_s, now))
        if now > known.at:
            row["cpu"] = round(max(0.0, cpu_s - known.cpu_s) / (now - known.at), 3)
            known.cpu_s, known.at = cpu_s, now
        with contextlib.suppress(OSError, ValueError, IndexError):
            row["memory_bytes"] = self._memory(process.pid, known, now)
        if process.pid in gpu_memory:
            row["gpu_memory_bytes"] = gpu_memory[process.pid]
        return row

    @staticmethod
    def _memory(pid: int, known: _Known, now: float) -> int:
        """Its own memory and its part of what it shares: ranks are forked, and share what was imported before."""
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if now - known.shared_at >= PSS_EVERY_S:
            known.shared_at = now
            with contextlib.suppress(OSError, StopIteration, ValueError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                proportional = next(line for line in lines if line.startswith("Pss:"))
                known.shared = max(0, resident - int(proportional.split()[1]) * 1024)
        return max(0, resident - known.shared)
