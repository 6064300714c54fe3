"""Worlds on the GPUs of this machine; without one these tests are skipped. They run in one worker: they share devices."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import GPUS
from tests.support.worlds import AgentProcess, Ranks, until

HERE = Path(__file__).parent


def find_gpus() -> list[str]:
    """The GPUs that may be used: those that the user who started the tests has named, or all."""
    said = os.environ[GPUS]
    if shutil.which("nvidia-smi") is None or not said:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    there = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    if listing.returncode or not there:
        return []
    return [str(number) for number in range(len(there))] if said == "all" else said.split(",")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = None if find_gpus() else pytest.mark.skip(reason="NOT TESTED: there is no GPU on this machine")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.xdist_group("gpu"))
            if skip is not None:
                item.add_marker(skip)


def memory_in_use(gpu: str) -> int:
    """MiB of a device that anybody holds."""
    asked = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout)


def wait_for_memory(gpu: str, at_most: int) -> None:
    """Until no more than so many MiB are in use: a process that ends gives its memory back some moments later."""
    until(lambda: memory_in_use(gpu) <= at_most, f"no more than {at_most} MiB of GPU {gpu} are in use", 30)


@pytest.fixture(scope="session")
def gpus() -> list[str]:
    """The GPUs of this machine that may be used."""
    return find_gpus()


@pytest.fixture(scope="session")
def two_gpus(gpus: list[str]) -> list[str]:
    """The first two of them."""
    if len(gpus) < 2:
        pytest.skip("NOT TESTED: NCCL between ranks; this machine has one GPU, and NCCL takes one rank for each")
    return gpus[:2]


@pytest.fixture(scope="session")
def gpu(gpus: list[str]) -> str:
    """One of them."""
    return gpus[0]


def _agent_on(gpus: list[str]) -> Iterator[AgentProcess]:
    process = AgentProcess(None, env={"CUDA_VISIBLE_DEVICES": ",".join(gpus)})
    yield process
    words = process.words()
    process.end()
    assert "Traceback" not in words, words


@pytest.fixture(scope="module")
def gpu_agent(gpu: str) -> Iterator[AgentProcess]:
    """An agent with one GPU."""
    yield from _agent_on([gpu])


@pytest.fixture(scope="module")
def world(gpu_agent: AgentProcess) -> Iterator[Ranks]:
    """A rank with a GPU, shared by the tests of a module."""
    ranks = Ranks(gpu_agent, 1)
    yield ranks
    ranks.end()


@pytest.fixture
def make_agent() -> Iterator[Callable[..., AgentProcess]]:
    """Makes agents with GPUs that end with the test."""
    agents: list[AgentProcess] = []

    def make(gpus: list[str], **env: str) -> AgentProcess:
        agents.append(AgentProcess(None, env={"CUDA_VISIBLE_DEVICES": ",".join(gpus), **env}))
        return agents[-1]

    yield make
    for agent in agents:
        agent.end()
