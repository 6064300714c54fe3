"""A stand-in of pynvml (the package nvidia-ml-py) for hosts without a GPU: its functions, its structs, its errors.

What each function answers for a part of a GPU (MIG), for a GPU that was lost and for a user without permission is what
NVML's documentation says of it: no index and no utilization of a part; every call fails for one that was lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


class NVMLError(Exception):
    """As pynvml raises them: one class for each code."""

    value = 999

    def __init__(self, value: int | None = None) -> None:
        self.value = self.value if value is None else value
        super().__init__(self.value)


class NVMLError_InvalidArgument(NVMLError):
    value = 2


class NVMLError_NotSupported(NVMLError):
    value = 3


class NVMLError_NoPermission(NVMLError):
    value = 4


class NVMLError_NotFound(NVMLError):
    value = 6


class NVMLError_DriverNotLoaded(NVMLError):
    value = 9


class NVMLError_GpuIsLost(NVMLError):
    value = 15


@dataclass
class Memory:
    """c_nvmlMemory_t: bytes."""

    total: int
    free: int
    used: int


@dataclass
class Utilization:
    """c_nvmlUtilization_t: percent."""

    gpu: int
    memory: int


@dataclass
class RunningProcess:
    """c_nvmlProcessInfo_v3_t as a friendly object; `usedGpuMemory` is None where the driver does not tell it."""

    pid: int
    usedGpuMemory: int | None
    gpuInstanceId: int | None = None
    computeInstanceId: int | None = None


@dataclass(eq=False)
class Gpu:
    """A GPU, or with `is_part` a part of one, which is found by its UUID only."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    used: int = 1 << 30
    total: int = 80 << 30
    busy: int = 50
    processes: list[RunningProcess] = field(default_factory=list)
    is_part: bool = False
    is_lost: bool = False
    is_forbidden: bool = False


class Driver(ModuleType):
    """The module.

    Args:
        gpus: those of the host, in the order of their numbers.
        parts: of them.
        init_error: raised by nvmlInit.
    """

    def __init__(self, gpus: list[Gpu], parts: list[Gpu] | None = None, init_error: Exception | None = None) -> None:
        super().__init__("pynvml")
        self._gpus, self._parts, self._init_error = gpus, parts or [], init_error
        self._is_open = False
        for name, value in globals().items():
            if name.startswith("NVMLError"):
                setattr(self, name, value)

    def nvmlInit(self) -> None:
        if self._init_error is not None:
            raise self._init_error
        self._is_open = True

    def nvmlDeviceGetCount(self) -> int:
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        assert self._is_open, "nvmlInit comes first"
        if not 0 <= index < len(self._gpus):
            raise NVMLError_InvalidArgument
        return self._usable(self._gpus[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        assert self._is_open, "nvmlInit comes first"
        found = next((gpu for gpu in [*self._gpus, *self._parts] if gpu.uuid == uuid), None)
        if found is None:
            raise NVMLError_NotFound
        return self._usable(found)

    @staticmethod
    def _usable(gpu: Gpu) -> Gpu:
        if gpu.is_forbidden:
            raise NVMLError_NoPermission
        return gpu

    @staticmethod
    def _asked(handle: Gpu, whole_only: bool = False) -> Gpu:
        if handle.is_lost:
            raise NVMLError_GpuIsLost
        if whole_only and handle.is_part:
            raise NVMLError_NotSupported
        return handle

    def nvmlDeviceGetIndex(self, handle: Gpu) -> int:
        return self._gpus.index(self._asked(handle, whole_only=True))

    def nvmlDeviceGetName(self, handle: Gpu) -> str:
        return self._asked(handle).name

    def nvmlDeviceGetUUID(self, handle: Gpu) -> str:
        return self._asked(handle).uuid

    def nvmlDeviceGetMemoryInfo(self, handle: Gpu, version: Any = None) -> Memory:
        gpu = self._asked(handle)
        return Memory(gpu.total, gpu.total - gpu.used, gpu.used)

    def nvmlDeviceGetUtilizationRates(self, handle: Gpu) -> Utilization:
        return Utilization(self._asked(handle, whole_only=True).busy, 0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Gpu) -> list[RunningProcess]:
        return list(self._asked(handle).processes)
