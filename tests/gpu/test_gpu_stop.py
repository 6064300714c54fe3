"""Stop on a GPU: in training, in a long kernel, in a collective of NCCL; the device is usable afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.gpu.conftest import memory_in_use, wait_for_memory
from tests.support.worlds import AgentProcess, Ranks

COOPERATIVE_S = 2.0
WORST_S = 8.0
CYCLES = 2_000_000_000  # of the device's clock: about a second

TRAINING = """
import torch
kept = torch.full((3,), float(rank), device=device)
net = torch.nn.Linear(256, 256).to(device)
optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
steps = 0
while True:
    optimizer.zero_grad()
    net(torch.randn(64, 256, device=device)).square().mean().backward()
    optimizer.step()
    steps += 1
    if steps == 5: print("in it")
"""


def device_works(world: Ranks) -> None:
    code = "import torch\nt = torch.ones(2, 2, device=device)\ntorch.distributed.all_reduce(t)\nfloat((t @ t).sum() / (2 * world_size ** 2))"
    assert world.ok(code).results() == ["4.0"] * world.size


@pytest.mark.alone
def test_stop_in_training_keeps_the_model_on_the_device(world: Ranks) -> None:
    pids = world.pids()
    outcome = world.send(TRAINING).wait_for("in it").stop().end()
    assert outcome.state == "stopped", outcome.report
    assert outcome.seconds < COOPERATIVE_S
    world.ok("for _ in range(3):\n    net(torch.ones(2, 256, device=device)).sum().backward()\n    optimizer.step()")
    device_works(world)
    assert world.pids() == pids


@pytest.mark.alone
def test_stop_in_a_kernel_of_seconds_aborts_the_group_and_keeps_the_device_and_the_variables(world: Ranks) -> None:
    """Nothing interrupts a kernel: the group is released meanwhile, as for a rank that waits in a collective."""
    pids = world.pids()
    world.ok("import torch\nkept = torch.arange(3.0, device=device)")
    generation = world.describe()["generation"]
    code = f"print('in it')\nfor _ in range(3): torch.cuda._sleep({CYCLES})\ntorch.cuda.synchronize()\nwhile True: pass"
    outcome = world.send(code).wait_for("in it").stop().end()
    assert outcome.state == "stopped", outcome.report
    assert outcome.seconds < WORST_S
    assert "lost" not in outcome.report
    assert world.ok("kept.tolist()").results() == ["[0.0, 1.0, 2.0]"]
    device_works(world)
    assert world.pids() == pids
    assert world.describe()["generation"] == generation + 1


@pytest.mark.alone
def test_a_rank_whose_kernel_does_not_end_is_killed_and_the_device_is_free_again(gpu: str, world: Ranks) -> None:
    before = memory_in_use(gpu)
    world.ok("import torch\nblock = torch.ones(1 << 30, dtype=torch.uint8, device=device)")
    code = f"print('in it')\nfor _ in range(60): torch.cuda._sleep({CYCLES})\ntorch.cuda.synchronize()"
    outcome = world.send(code).wait_for("in it").stop().end()
    assert outcome.state == "stopped"
    assert outcome.seconds < WORST_S + COOPERATIVE_S
    assert "lost" in outcome.report
    device_works(world)
    wait_for_memory(gpu, before + 64)


@pytest.fixture
def pair(two_gpus: list[str], make_agent: Callable[..., AgentProcess]) -> Ranks:
    """Two ranks with a GPU each."""
    agent = make_agent(two_gpus)
    return Ranks(agent, 2)


def test_every_rank_has_a_device_of_its_own(pair: Ranks) -> None:
    code = "import torch\nt = torch.ones(1, device=device)\ntorch.distributed.all_reduce(t)\n(str(device), float(t))"
    assert pair.ok(code).results() == ["('cuda:0', 2.0)", "('cuda:1', 2.0)"]


BLOCKED = {
    "all_reduce": "if rank == 0: dist.all_reduce(torch.ones(1, device=device)); torch.cuda.synchronize()",
    "recv": "if rank == 0: dist.recv(torch.ones(1, device=device), src=1); torch.cuda.synchronize()",
    "barrier": "if rank == 0: dist.barrier()",
}


@pytest.mark.parametrize("where", BLOCKED)
def test_stop_releases_ranks_that_wait_in_a_collective_of_nccl(pair: Ranks, where: str) -> None:
    head = "import time, torch, torch.distributed as dist\nkept = torch.full((3,), float(rank), device=device)\nprint('in it')\n"
    outcome = pair.send(f"{head}{BLOCKED[where]}\ntime.sleep(100)").wait_for("in it", times=2).stop().end()
    assert outcome.state == "stopped", outcome.report
    assert outcome.seconds < WORST_S
    assert "lost" not in outcome.report
    assert pair.ok("float(kept.sum())").results() == ["0.0", "3.0"]
    device_works(pair)


def test_a_failed_rank_lets_its_peer_out_of_a_collective_of_nccl(pair: Ranks) -> None:
    outcome = pair.run(
        """
        import torch, torch.distributed as dist
        if rank == 1: raise ValueError("mine")
        dist.all_reduce(torch.ones(1, device=device))
        torch.cuda.synchronize()
        """
    )
    assert outcome.state == "failed"
    assert outcome.error["ename"] == "ValueError"
    assert outcome.seconds < WORST_S
    device_works(pair)
