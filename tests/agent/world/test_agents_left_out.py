"""Agents that get no ranks of a run any more, by values: who leads it next knows of them, and nobody gives them any."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.agent.runs.supervisor import RunSupervisor
from jupyter_llmcloud.agent.world.world import World
from jupyter_llmcloud.cluster.worker_plugin import AgentPlugin
from jupyter_llmcloud.core.scheduling.elasticity import LeaveOut, SizeBounds
from jupyter_llmcloud.core.scheduling.placement import agent_key
from jupyter_llmcloud.errors import Busy, CapacityError
from jupyter_llmcloud.protocol.agent_messages import Execute, PlaceRanks, StartWorld
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

SLOW = agent_key("slowhost", "/run/agent.sock")


def test_a_world_that_another_agent_leads_asks_for_no_slots_of_theirs_and_says_why_there_are_none() -> None:
    asked: list[Collection[str]] = []

    async def find_capacity(
        num_ranks: int, at_once: bool = False, at_least: int = 0, without: Collection[str] = ()
    ) -> Any:
        asked.append(set(without))
        raise Busy("none")

    async def wait() -> None:
        node: Any = SimpleNamespace(find_capacity=find_capacity, can_ask_cluster=True, address="b.sock", key="b")
        world = World(node, StartWorld(world_id="w", agents=[{"num_ranks": 1}]), SimpleNamespace())
        world.inherit(1, [], [SLOW])
        with pytest.raises(Busy, match=r"no room for them beside what is left out as slow \(on slowhost\)\.$"):
            await world.find_capacity(SizeBounds(1, 2))

    asyncio.run(wait())
    assert asked == [{SLOW}]


def test_an_agent_that_is_left_out_is_in_the_record_before_the_run_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "train")

    async def left_out() -> list[str]:
        cell = Execute(world_id="w", run_id="train", name="train", code="", ranks=[0, 1], folder=str(folder.path))
        record = RunRecord("train", "train", "running", ranks=[0, 1], world_size=2)
        folder.create(record, "")
        world = SimpleNamespace(links={}, size=2, leave_out=lambda rank: SLOW if rank else "")
        run = RunSupervisor(cell, record, folder, world, lambda _: SimpleNamespace())  # type: ignore[arg-type,return-value]
        run._carry_out(LeaveOut(0))
        assert folder.read().agents_left_out == []
        run._carry_out(LeaveOut(1))
        return folder.read().agents_left_out

    assert asyncio.run(left_out()) == [SLOW]


def test_a_worker_that_knows_the_cluster_gives_them_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that the agent has everywhere, whatever socket leads there from here."""
    rows = {
        name: {"host": name, "address": "/run/agent.sock", "num_slots": 4, "free_slots": 4, "has_gpus": False}
        for name in ("slowhost", "quick")
    }
    plugin = AgentPlugin("cluster")

    async def bridge_to(info: dict[str, Any], always: bool = False) -> str:
        return f"/bridge/{info['host']}"

    monkeypatch.setattr(plugin, "bridge_to", bridge_to)
    found = asyncio.run(plugin._place(PlaceRanks(num_ranks=2, without=[SLOW]), rows))
    assert [place["host"] for place in found.agents] == ["quick"]
    with pytest.raises(CapacityError):
        asyncio.run(plugin._place(PlaceRanks(num_ranks=5, without=[SLOW]), rows))
