"""A world on GPUs: a device for each rank, both backends, memory that is seen and given back, whatever ends a rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from jupyter_llmcloud.errors import Busy, WorldError
from jupyter_llmcloud.storage.journal import read_all
from tests.gpu.conftest import memory_in_use, wait_for_memory
from tests.support.worlds import AgentProcess, Ranks, until

GIGABYTE = 1 << 30
SLACK = 64  # MiB; other programs on the device may move a little meanwhile


def test_a_rank_is_given_its_device(world: Ranks) -> None:
    code = "import os, torch\n(str(device), torch.cuda.current_device(), torch.cuda.device_count(), os.environ['CUDA_VISIBLE_DEVICES'])"
    (result,) = world.ok(code).results()
    assert result.startswith("('cuda:0', 0, 1, ")


def test_accelerate_and_trainer_find_the_device(world: Ranks) -> None:
    code = """
    from accelerate import Accelerator
    from transformers import TrainingArguments
    where = Accelerator().device.type, TrainingArguments("/tmp/none", report_to=[]).device.type
    where
    """
    assert world.ok(code).results() == ["('cuda', 'cuda')"]


def test_tensors_of_the_host_go_by_gloo_and_those_of_the_device_by_nccl(world: Ranks) -> None:
    code = """
    import torch, torch.distributed as dist
    near, far = torch.ones(1), torch.ones(1, device=device)
    dist.all_reduce(near); dist.all_reduce(far)
    (float(near), float(far), dist.get_backend(), str(far.device))
    """
    (result,) = world.ok(code).results()
    assert result.startswith("(1.0, 1.0, ")
    assert "nccl" in result
    assert "cuda:0" in result


def test_more_ranks_than_gpus_are_refused_with_their_numbers(gpu_agent: AgentProcess, world: Ranks) -> None:
    with pytest.raises(Busy, match="2 slots asked for, 0 of 1 are free"):
        Ranks(gpu_agent, 2)
    assert world.ok("1").results() == ["1"]


def test_a_gpu_is_used_by_one_agent_of_the_host_at_a_time(
    world: Ranks, gpu: str, make_agent: Callable[..., AgentProcess]
) -> None:
    other = make_agent([gpu])
    with pytest.raises(Busy, match="0 of 1 are free"):
        Ranks(other, 1)
    assert world.ok("1").results() == ["1"]


def test_two_ranks_on_one_device_are_told_why_they_cannot_meet(
    gpu: str, tmp_path: Path, make_agent: Callable[..., AgentProcess]
) -> None:
    """Two agents with runtime folders of their own do not see each other's locks, as in two containers."""
    first, second = (make_agent([gpu], LLMCLOUD_RUNTIME_DIR=str(tmp_path / name)) for name in "ab")
    with pytest.raises(WorldError, match=r"(?s)could not join the process group.*(Duplicate GPU|invalid usage)"):
        Ranks(first, 2, shares=[(first, 1), (second, 1)])
    world = Ranks(first, 1)
    assert world.ok("str(device)").results() == ["'cuda:0'"]
    world.end()


def test_variables_on_the_device_come_back_on_the_host(world: Ranks) -> None:
    world.ok("import torch\nfound = {'weights': torch.arange(3.0, device=device)}")
    found = world.pull("found")["weights"]
    assert found.device.type == "cpu"
    assert found.tolist() == [0.0, 1.0, 2.0]


def test_memory_figures_are_logged_and_fall_when_the_memory_is_let_go(world: Ranks) -> None:
    outcome = world.ok(
        """
        import torch
        torch.cuda.reset_peak_memory_stats()
        for step in range(3):
            block = torch.empty((step + 1) << 28, dtype=torch.uint8, device=device)
            run.log(dict(memory=torch.cuda.max_memory_allocated()), step=step)
            del block
        float(torch.cuda.memory_allocated())
        """
    )
    figures = outcome.values("memory")
    assert figures == sorted(figures)
    assert figures[2] >= 3 << 28
    assert float(outcome.results()[0]) < 1 << 28
    recorded = [row["values"]["memory"] for row in read_all(outcome.folder.metrics(0)) if "values" in row]
    assert recorded == figures


def test_a_full_device_fails_the_cell_and_keeps_the_variables(world: Ranks) -> None:
    pids = world.pids()
    world.ok("import torch\nkept = torch.ones(3, device=device)")
    outcome = world.run("torch.empty(1 << 45, dtype=torch.uint8, device=device)")
    assert outcome.state == "failed"
    assert "OutOfMemoryError" in outcome.error["ename"]
    assert world.ok("float(kept.sum())").results() == ["3.0"]
    assert world.pids() == pids


def test_a_killed_rank_gives_its_memory_back_and_the_next_one_has_the_device(
    gpu: str, make_agent: Callable[..., AgentProcess]
) -> None:
    before = memory_in_use(gpu)
    world = Ranks(make_agent([gpu], LLMCLOUD_RUNTIME_DIR=own_runtime()), 1)
    world.ok(f"import torch\nblock = torch.ones({2 * GIGABYTE}, dtype=torch.uint8, device=device)")
    assert memory_in_use(gpu) > before + 1000
    running = world.send("import time\nprint('in it')\ntime.sleep(100)").wait_for("in it")
    os.kill(world.pids()[0], signal.SIGKILL)
    outcome = running.end()
    assert outcome.state == "failed"
    assert "SIGKILL" in outcome.error["evalue"]
    wait_for_memory(gpu, before + SLACK)
    code = "import torch\nt = torch.ones(1, device=device)\ntorch.distributed.all_reduce(t)\n('block' in globals(), float(t))"
    assert world.ok(code).results() == ["(False, 1.0)"]
    world.end()


def own_runtime() -> str:
    """A runtime folder beside that of the session: its locks are not seen by the agent that other tests share."""
    return f"{os.environ['LLMCLOUD_RUNTIME_DIR']}-gpu"


def test_a_world_that_ends_gives_memory_and_device_back(gpu: str, make_agent: Callable[..., AgentProcess]) -> None:
    before = memory_in_use(gpu)
    agents = [make_agent([gpu], LLMCLOUD_RUNTIME_DIR=own_runtime()) for _ in range(2)]
    for agent in agents:
        world = Ranks(agent, 1)
        world.ok(f"import torch\nblock = torch.ones({GIGABYTE}, dtype=torch.uint8, device=device)")
        world.end()
        wait_for_memory(gpu, before + SLACK)


def test_a_killed_agent_leaves_neither_memory_nor_a_lock(gpu: str, make_agent: Callable[..., AgentProcess]) -> None:
    before = memory_in_use(gpu)
    agent = make_agent([gpu], LLMCLOUD_RUNTIME_DIR=own_runtime())
    Ranks(agent, 1).ok(f"import torch\nblock = torch.ones({GIGABYTE}, dtype=torch.uint8, device=device)")
    agent.end_by_force()
    wait_for_memory(gpu, before + SLACK)
    next_one = make_agent([gpu], LLMCLOUD_RUNTIME_DIR=own_runtime())
    world = until(lambda: started(next_one), "the next agent has the device")
    assert world.ok("str(device)").results() == ["'cuda:0'"]
    world.end()


def started(agent: AgentProcess) -> Ranks | None:
    """A world of one rank, if there is room."""
    try:
        return Ranks(agent, 1)
    except Busy:
        return None
