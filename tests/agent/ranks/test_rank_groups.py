"""The ranks of a world on this agent, one leader of the world after the other; the zygote is stood in for."""

import asyncio
import subprocess
from types import SimpleNamespace
from typing import Any

from jupyter_llmcloud.agent.ranks.devices import Devices
from jupyter_llmcloud.agent.ranks.local_group import LocalGroups, RankEvents
from jupyter_llmcloud.agent.ranks.rank_groups import RankGroups
from jupyter_llmcloud.protocol.agent_messages import StartWorld

HERE = "here.sock"


class Forks:
    """Forks processes that wait, and remembers their names."""

    def __init__(self) -> None:
        self.by_name: dict[str, subprocess.Popen[bytes]] = {}

    async def warm(self) -> None:
        """They are instant."""

    async def fork(self, request: Any, _: Any) -> int:
        process = self.by_name[request.name] = subprocess.Popen(["sleep", "60"], start_new_session=True)
        return process.pid


async def _store(*_: Any) -> str:
    return "127.0.0.1:1"


def test_a_rank_of_the_leader_before_that_is_heard_to_have_ended_is_not_taken_for_the_new_one() -> None:
    """A killed leader's ranks are ended by who leads next, which forks its own before it hears that those are gone."""
    zygote, heard = Forks(), []
    hosted = LocalGroups(zygote, Devices(num_slots=2))  # type: ignore[arg-type]
    node = SimpleNamespace(
        address=HERE, host_ranks=hosted.make, start_store=_store, end_store=lambda _: None, has_store=lambda _: True
    )
    spec = StartWorld(world_id="world", agents=[])
    events = RankEvents(lambda *_: None, lambda rank, status, _: heard.append((rank, status)))

    async def take_over() -> None:
        before, now = (RankGroups(node, spec, events) for _ in range(2))  # type: ignore[arg-type]
        slots = [{"address": HERE, "num_ranks": 1}]
        await before.start(slots, 1)
        [old] = zygote.by_name
        before.close()
        await now.start(slots, 1)
        hosted.exited(old, -9)
        assert heard == []
        assert [rank for _, rank, _, _ in hosted.ranks()] == [0]
        now.close()
        [_, new] = zygote.by_name
        hosted.exited(new, -9)
        assert not hosted

    try:
        asyncio.run(take_over())
    finally:
        for process in zygote.by_name.values():
            process.kill()
            process.wait()
