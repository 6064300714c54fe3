"""What the driver tells of GPUs, by NVML, where nvidia-ml-py is installed. Whatever goes wrong, nothing is told."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any


class GpuStats:
    """Of the GPUs of this agent.

    Args:
        gpus: as in CUDA_VISIBLE_DEVICES: indices or UUIDs.
    """

    def __init__(self, gpus: Sequence[str]) -> None:
        self._gpus = gpus
        self._nvml: Any = None
        self._handles: dict[str, Any] = {}
        self._is_tried = False

    def read(self) -> tuple[list[dict[str, Any]], dict[int, int]]:
        """([what is known of each GPU], {pid: bytes of GPU memory}); both empty where nothing is known."""
        if not self._is_tried:
            self._is_tried = True
            self._open()
        rows: list[dict[str, Any]] = []
        by_process: dict[int, int] = {}
        for index, (gpu, handle) in enumerate(self._handles.items()):
            row, used = self._row(index, gpu, handle)
            rows.append(row)
            for pid, num_bytes in used.items():
                by_process[pid] = by_process.get(pid, 0) + num_bytes
        return rows, by_process

    def _open(self) -> None:
        if not self._gpus:
            return
        with contextlib.suppress(Exception):  # no library, no driver, a driver of another version
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            self._nvml = nvml
        for gpu in self._gpus if self._nvml is not None else ():
            with contextlib.suppress(Exception):  # one that is gone, or that this user may not look at
                self._handles[gpu] = self._handle(gpu)

    def _handle(self, gpu: str) -> Any:
        """Raises what NVML raises. CUDA takes the beginning of a UUID for the whole of it, where it is the only one."""
        by_index = self._nvml.nvmlDeviceGetHandleByIndex
        if gpu.isdigit():
            return by_index(int(gpu))
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(gpu)
        except Exception:
            handles = [by_index(index) for index in range(self._nvml.nvmlDeviceGetCount())]
            found = [handle for handle in handles if _text(self._nvml.nvmlDeviceGetUUID(handle)).startswith(gpu)]
            if len(found) != 1:
                raise
            return found[0]

    def _row(self, index: int, gpu: str, handle: Any) -> tuple[dict[str, Any], dict[int, int]]:
        row: dict[str, Any] = {"index": int(gpu) if gpu.isdigit() else index, "uuid": "" if gpu.isdigit() else gpu}
        used: dict[int, int] = {}
        with contextlib.suppress(Exception):  # of a part of a GPU (MIG) there is none, nor its utilization
            row["index"] = int(self._nvml.nvmlDeviceGetIndex(handle))
        with contextlib.suppress(Exception):
            row["name"] = _text(self._nvml.nvmlDeviceGetName(handle))
        with contextlib.suppress(Exception):
            row["uuid"] = _text(self._nvml.nvmlDeviceGetUUID(handle))
        with contextlib.suppress(Exception):
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            row["memory_bytes"], row["total_memory_bytes"] = int(memory.used), int(memory.total)
        with contextlib.suppress(Exception):
            row["utilization"] = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        with contextlib.suppress(Exception):
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                used[process.pid] = used.get(process.pid, 0) + int(process.usedGpuMemory or 0)
        return row, used


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
