"""What an agent tells of its host, its processes and its GPUs; the driver is a stand-in here."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.agent.gpus import GpuStats
from jupyter_llmcloud.agent.resources import Ours, ResourceMonitor


class Driver:
    """As pynvml: two GPUs, of which the second one answers nothing about its utilization."""

    def nvmlInit(self) -> None:
        return

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid != "GPU-1":
            raise ValueError("no such device")
        return 1

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"H100"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=10 + handle, total=80)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle:
            raise RuntimeError("not supported")
        return SimpleNamespace(gpu=75)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=4), SimpleNamespace(pid=1, usedGpuMemory=None)]


def test_gpus_are_told_as_far_as_the_driver_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    rows, processes = GpuStats(["0", "GPU-1", "MIG-7"]).read()
    assert rows == [
        {
            "index": 0,
            "uuid": "GPU-0",
            "name": "H100",
            "memory_bytes": 10,
            "total_memory_bytes": 80,
            "utilization": 0.75,
        },
        {"index": 1, "uuid": "GPU-1", "name": "H100", "memory_bytes": 11, "total_memory_bytes": 80},
    ]
    assert processes == {os.getpid(): 8, 1: 0}


def test_without_a_driver_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuStats(["0"]).read() == ([], {})


def test_a_driver_that_fails_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("the driver was replaced")

    monkeypatch.setitem(sys.modules, "pynvml", Broken())
    assert GpuStats(["0"]).read() == ([], {})


async def test_processes_are_told_with_their_memory_and_those_that_are_gone_are_not() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours = [Ours(pid=os.getpid(), kind="rank", world_id="w", rank=3), Ours(pid=gone.pid, kind="zygote")]
    found = await ResourceMonitor(lambda: ours, GpuStats([])).describe()
    (row,) = found.processes
    assert (row["pid"], row["kind"], row["world_id"], row["rank"]) == (os.getpid(), "rank", "w", 3)
    assert 1 << 20 < row["memory_bytes"] < found.total_memory_bytes
    assert found.num_cores >= 1 and 0 <= found.cpu <= 1 and found.devices == []


async def test_many_who_ask_at_once_are_answered_by_one_look() -> None:
    looks = 0

    def processes() -> list[Ours]:
        nonlocal looks
        looks += 1
        return []

    resources = ResourceMonitor(processes, GpuStats([]))
    await asyncio.gather(*(resources.describe() for _ in range(20)))
    assert looks == 1
