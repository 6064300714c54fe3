"""Which other agent a worker names to lead in its own agent's place, by values."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from distributed import Client

from jupyter_llmcloud.cluster.worker_plugin import PLUGIN_NAME, AgentPlugin, register
from jupyter_llmcloud.errors import WorldError


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


class _RefusingClient:
    """Of a cluster whose workers cannot have the plugin, which its scheduler has taken nevertheless."""

    def __init__(self, error: Exception) -> None:
        self.plugins: set[str] = set()
        self._error = error

    async def register_plugin(self, plugin: AgentPlugin) -> None:
        self.plugins.add(plugin.name)
        raise self._error

    async def unregister_worker_plugin(self, name: str) -> None:
        self.plugins.discard(name)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'jupyter_llmcloud'"), "pip install jupyter-llmcloud=="),
        (
            WorldError("the node agent of worker w ended at its start"),
            "^the node agent of worker w ended at its start$",
        ),
    ],
)
def test_workers_that_cannot_have_an_agent_are_told_and_nothing_is_left_by_which_others_would_end(
    error: Exception, words: str
) -> None:
    client = _RefusingClient(error)
    with pytest.raises(WorldError, match=words):
        asyncio.run(register(cast(Client, client), AgentPlugin("cluster")))
    assert PLUGIN_NAME not in client.plugins
