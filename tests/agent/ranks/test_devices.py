"""Slots of an agent: all of them or none; a GPU is used by one agent of the host at a time."""

import subprocess
import sys

import pytest

from jupyter_llmcloud.agent.ranks.devices import Devices
from jupyter_llmcloud.errors import Busy

HOLDER = """
import sys
from jupyter_llmcloud.agent.ranks.devices import Devices
devices = Devices()
print(*devices.take("theirs", 2), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-2a/b,3")


def test_a_world_gets_all_its_slots_or_none():
    devices = Devices(num_slots=3)
    assert devices.take("a", 2) == ["0", "1"]
    with pytest.raises(Busy, match="2 slots asked for, 1 of 3 are free"):
        devices.take("b", 2)
    assert devices.free == ["2"]
    devices.give_back("a", keep=1)
    assert devices.take("b", 2) == ["1", "2"]


def test_two_agents_of_a_host_never_use_one_gpu(four_gpus):
    first, second = Devices(), Devices()
    assert first.take("a", 3) == ["0", "1", "GPU-2a/b"]
    assert second.free == ["3"]
    with pytest.raises(Busy, match="2 slots asked for, 1 of 4"):
        second.take("b", 2)
    assert first.take("c", 1) == ["3"]
    first.give_back("a", keep=1)
    assert second.take("b", 2) == ["1", "GPU-2a/b"]
    first.give_back("a")
    first.give_back("c")
    second.give_back("b")
    assert first.free == second.free == first.slots


def test_the_gpus_of_a_killed_agent_are_free_again(four_gpus):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline().split() == ["0", "1"]
        assert Devices().free == ["GPU-2a/b", "3"]
        holder.kill()
    assert len(Devices().free) == 4


def test_cpu_slots_are_shared_as_the_cores_are():
    first, second = Devices(num_slots=2), Devices(num_slots=2)
    assert first.take("a", 2) == second.take("a", 2)
