"""Process groups of processes that a cell starts itself, as tutorials do, and torch.distributed.rpc."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from jupyter_llmcloud.training.group.own_groups import RankPlace, is_own_group, port_of
from tests.support.worlds import Ranks

# From "Writing Distributed Applications with PyTorch", but for the port and what is printed.
TUTORIAL = """
import os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

def run(rank, size):
    tensor = torch.zeros(1)
    if rank == 0:
        tensor += 1
        dist.send(tensor=tensor, dst=1)
    else:
        dist.recv(tensor=tensor, src=0)
    group = dist.new_group([0, 1])
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    print(f"Rank {{rank}} has data {{tensor[0]}} of {{dist.get_world_size()}}", flush=True)

def init_process(rank, size, fn, backend="gloo"):
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = "{port}"
    dist.init_process_group(backend, rank=rank, world_size=size)
    fn(rank, size)

if __name__ == "__main__":
    world_size = 2
    processes = []
    mp.set_start_method("{method}", force=True)
    for number in range(world_size):
        p = mp.Process(target=init_process, args=(number, world_size, run))
        p.start()
        processes.append(p)
    for p in processes:
        p.join()
    mp.set_start_method("fork", force=True)
    codes = [p.exitcode for p in processes]
"""
RPC = """
import torch
import torch.distributed.rpc as rpc
rpc.init_rpc(f"worker{rank}", rank=rank, world_size=world_size)
answer = rpc.rpc_sync(f"worker{1 - rank}", torch.add, args=(torch.ones(2), rank)).tolist()
rpc.shutdown()
answer
"""


def free_port(of_rank: int = 1) -> int:
    """One that rank 0 can have, while another rank can have its own."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port_of(RankPlace(of_rank, 2), port)))
            except OSError:
                continue
            return port


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.story)])
def test_processes_that_a_tutorial_starts_are_a_group_on_each_rank(world: Ranks, method: str) -> None:
    outcome = world.ok(TUTORIAL.format(port=free_port(), method=method))
    assert (world.pull("codes"), world.pull("codes", 1)) == ([0, 0], [0, 0])
    assert outcome.text().count("has data 2.0 of 2") == 4
    assert "each of the 2 ranks of this cell has started processes of its own" in outcome.text(1, "stderr")
    assert outcome.text(0, "stderr").count("\n") == 1  # its function `run` hides ours, which is told
    world.ok("import torch.distributed as dist\nnumber = torch.ones(1)\ndist.all_reduce(number)\nassert number == 2")


def test_the_ports_of_ranks_are_apart_and_that_of_the_first_is_as_said() -> None:
    ports = [port_of(RankPlace(rank, 64), port) for rank in range(64) for port in (29500, 29501)]
    assert ports[:2] == [29500, 29501]
    assert len(set(ports)) == len(ports)
    assert all(1024 <= port_of(RankPlace(rank, 64), 65535) <= 65535 for rank in range(64))


@pytest.mark.parametrize(
    ("rank", "world_size", "siblings", "own"),
    [(0, 2, False, True), (1, 2, False, False), (1, 2, True, True), (1, 4, False, True)],
)
def test_one_process_of_each_rank_may_be_in_a_group_over_all_ranks(
    rank: int, world_size: int, siblings: bool, own: bool
) -> None:
    assert is_own_group(RankPlace(1, 2), rank, world_size, lambda: siblings) is own


def test_rpc_meets_in_the_store_of_the_world_again_and_again(new_world: Callable[..., Ranks]) -> None:
    world = new_world()
    for _ in range(2):
        assert world.ok(RPC).results() == ["[1.0, 1.0]", "[2.0, 2.0]"]


def test_rpc_on_ranks_that_have_not_used_it_equally_often_fails_instead_of_waiting(
    new_world: Callable[..., Ranks],
) -> None:
    world = new_world()
    world.ok(
        "import torch.distributed.rpc as rpc\nrpc.init_rpc('alone', rank=0, world_size=1)\nrpc.shutdown()", ranks=[0]
    )
    failed = world.run(RPC)
    assert failed.error["ename"] == "RuntimeError"
    assert "was used 1, 0 times before on the ranks of this cell" in failed.error["evalue"]
    assert "%world restart" in failed.error["evalue"]
