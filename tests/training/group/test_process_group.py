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
