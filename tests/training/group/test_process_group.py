"""The group of a world, beside what cells set for the whole process."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.worlds import Ranks


def test_a_default_timeout_of_sockets_does_not_keep_ranks_from_meeting_again(new_world: Callable[..., Ranks]) -> None:
    world = new_world()
    world.ok("import socket\nsocket.setdefaulttimeout(0.5)")
    assert world.run("raise ValueError if rank == 0 else None").state == "failed"
    add = "import torch, socket\nnumber = torch.ones(1)\ntorch.distributed.all_reduce(number)\n"
    assert world.ok(add + "number.item(), socket.getdefaulttimeout()").results() == ["(2.0, 0.5)"] * 2


def test_a_script_that_counts_on_another_number_of_processes_is_told_how_many_there_are(world: Ranks) -> None:
    world.ok("import torch.distributed as dist\ndist.init_process_group('gloo', rank=rank, world_size=2)")
    failed = world.run("dist.init_process_group('gloo', None, None, 4, rank)")
    assert failed.error["ename"] == "ValueError"
    assert "world_size=4): the group of a cell is that of its world, of 2 ranks" in failed.error["evalue"]
    assert "%world resize 4" in failed.error["evalue"]
    alone = world.ok("dist.init_process_group('gloo', rank=0, world_size=1)")
    assert "dist.get_world_size() is 2" in alone.text(0, "stderr")
    assert alone.text(1, "stderr") == ""
