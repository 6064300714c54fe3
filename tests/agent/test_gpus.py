"""What NVML tells of GPUs reaches the panels: of whole ones, of parts (MIG), of lost and of forbidden ones."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from typing import Any

import pytest

from jupyter_llmcloud.agent.gpus import GpuStats
from jupyter_llmcloud.agent.resources import Ours, ResourceMonitor
from jupyter_llmcloud.protocol.http.clusters import Device
from tests.support import nvml
from tests.support.nvml import Driver, Gpu, RunningProcess

GIB = 1 << 30


def read(monkeypatch: pytest.MonkeyPatch, driver: Driver, *gpus: str) -> tuple[list[dict[str, Any]], dict[int, int]]:
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return GpuStats(gpus).read()


def test_gpus_have_the_number_that_they_have_on_their_host(monkeypatch: pytest.MonkeyPatch) -> None:
    host = [Gpu(f"GPU-{number}") for number in range(4)]
    rows, _ = read(monkeypatch, Driver(host), "2", "GPU-1")
    assert [(row["index"], row["uuid"]) for row in rows] == [(2, "GPU-2"), (1, "GPU-1")]


def test_memory_and_utilization_are_told_in_bytes_and_as_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = read(monkeypatch, Driver([Gpu("GPU-0", used=3 * GIB, busy=75)]), "0")
    assert (rows[0]["memory_bytes"], rows[0]["total_memory_bytes"], rows[0]["utilization"]) == (3 * GIB, 80 * GIB, 0.75)
    assert Device(**rows[0]).name == "NVIDIA H100 80GB HBM3"


def test_the_beginning_of_a_uuid_is_enough_where_it_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver([Gpu("GPU-8932f937-d72c"), Gpu("GPU-11aa"), Gpu("GPU-11bb")])
    rows, _ = read(monkeypatch, driver, "GPU-8932f937", "GPU-11")
    assert [row["uuid"] for row in rows] == ["GPU-8932f937-d72c"]


def test_of_a_part_of_a_gpu_its_memory_is_told_and_no_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Gpu("MIG-7", "NVIDIA H100 MIG 1g.10gb", used=GIB, total=10 * GIB, is_part=True)
    part.processes.append(RunningProcess(os.getpid(), 2 * GIB, 7, 0))
    rows, processes = read(monkeypatch, Driver([Gpu("GPU-0")], [part]), "MIG-7")
    assert rows[0]["total_memory_bytes"] == 10 * GIB and "utilization" not in rows[0]
    assert Device(**rows[0]).utilization is None
    assert processes == {os.getpid(): 2 * GIB}


def test_a_lost_gpu_and_one_that_is_forbidden_hide_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver([Gpu("GPU-0", is_lost=True), Gpu("GPU-1", is_forbidden=True), Gpu("GPU-2", busy=10)])
    rows, _ = read(monkeypatch, driver, "0", "1", "2")
    assert rows[0] == {"index": 0, "uuid": ""}  # it is there, and nothing is known of it
    assert [row["index"] for row in rows] == [0, 2] and rows[1]["utilization"] == 0.1


@pytest.mark.parametrize(
    "error", [nvml.NVMLError_DriverNotLoaded(), nvml.NVMLError_NoPermission(), OSError("no library")]
)
def test_without_a_driver_that_may_be_asked_there_are_no_devices(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    assert read(monkeypatch, Driver([Gpu("GPU-0")], init_error=error), "0") == ([], {})


async def test_a_rank_is_told_with_its_memory_on_all_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [RunningProcess(os.getpid(), GIB), RunningProcess(1, None)]
    monkeypatch.setitem(sys.modules, "pynvml", Driver([Gpu("GPU-0", processes=own), Gpu("GPU-1", processes=own[:1])]))
    ours = [Ours(pid=os.getpid(), kind="rank", world_id="w", rank=0, device="0")]
    found = await ResourceMonitor(lambda: iter(ours), GpuStats(["0", "1"])).describe()
    assert found.processes[0]["gpu_memory_bytes"] == 2 * GIB
    assert [device["index"] for device in found.devices] == [0, 1]
    await asyncio.sleep(0)


def test_the_stand_in_has_the_functions_and_errors_of_the_real_module() -> None:
    real = pytest.importorskip("pynvml")
    for name, function in inspect.getmembers(Driver, inspect.isfunction):
        if name.startswith("nvml"):
            theirs = inspect.signature(getattr(real, name))
            ours = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
            assert list(theirs.parameters) == ours or list(theirs.parameters) == ["args", "kwargs"], name
    for name in vars(nvml):
        if name.startswith("NVMLError_"):
            assert issubclass(getattr(real, name), real.NVMLError), name
    assert {field for field, _ in real.c_nvmlMemory_t._fields_} >= {"total", "free", "used"}
    assert {field for field, _ in real.c_nvmlUtilization_t._fields_} >= {"gpu", "memory"}
