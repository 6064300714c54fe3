"""Which other agent a worker names to lead in its own agent's place, by values."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jupyter_llmcloud.cluster.worker_plugin import AgentPlugin


def agent(name: str, **about: Any) -> dict[str, Any]:
    return {"name": name, "host": "a", "is_leaving": False, "is_warm": True, "free_slots": 1, **about}


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ([], ""),
        ([agent("w1", is_leaving=True)], ""),
        ([agent("w1", is_leaving=True, host="b"), agent("w2", free_slots=0)], "w2"),
        ([agent("w1", is_warm=False, free_slots=8), agent("w2")], "w2"),
        ([agent("w1"), agent("w2", host="b", free_slots=0)], "w2"),
    ],
)
def test_who_will_be_taken_away_does_not_stand_by_and_another_host_does_first(
    others: list[dict[str, Any]], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def bridge_to(self: AgentPlugin, info: dict[str, Any], always: bool = False) -> str:
        return str(info["name"])

    monkeypatch.setattr(AgentPlugin, "bridge_to", bridge_to)
    plugin = AgentPlugin("cluster")
    plugin.info = agent("w0")
    rows = {row["name"]: row for row in [agent("w0"), *others]}
    assert asyncio.run(plugin._another(rows)).address == chosen
