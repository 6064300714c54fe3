"""Which other agent a worker names to lead in its own agent's place, and when it replaces that one, by values."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from distributed import Client, Worker

from jupyter_llmcloud.cluster import worker_plugin
from jupyter_llmcloud.cluster.worker_plugin import PLUGIN_NAME, AgentPlugin, register
from jupyter_llmcloud.errors import ConnectionLost, WorldError
from jupyter_llmcloud.system.atomic_files import read_json


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


@pytest.mark.parametrize(("by", "ends_at_once"), [("SIGTERM", True), ("SIGKILL", False)])
def test_an_agent_that_was_told_to_end_is_not_replaced_as_long_as_its_worker_may_be_about_to_end(
    by: str, ends_at_once: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The one in its place would claim its runs, and be killed with its job in the next moment."""
    monkeypatch.setattr(worker_plugin, "AWAY_S", 0.3)
    monkeypatch.setattr(worker_plugin, "ensure_agent", ensure := _Agents(tmp_path))
    monkeypatch.setattr(worker_plugin, "AgentConnection", _Connection)
    monkeypatch.setattr(worker_plugin, "living_agent", lambda folder: read_json(folder / "agent.json"))
    worker = cast(Worker, SimpleNamespace(name="w", address="tcp://127.0.0.1:1"))

    async def story() -> None:
        plugin = AgentPlugin("cluster")
        plugin._folder = tmp_path
        await plugin.hold(worker)
        connection = cast(Any, plugin._connection)
        if by == "SIGTERM":
            (tmp_path / "agent.json").unlink()
        connection.gone.set()
        if ends_at_once:
            with pytest.raises(ConnectionLost, match="told to end"):
                await plugin.hold(worker)
        assert ensure.num_started == 1
        async with asyncio.timeout(5):
            while ensure.num_started < 2:
                await asyncio.sleep(0.01)
        await plugin._let_go()

    asyncio.run(story())


def test_an_agent_that_was_killed_while_somebody_asked_for_it_is_not_taken_for_one_that_has_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who starts another one removes its file, and only then does its connection end."""

    class Slow(_Agents):
        async def __call__(self, *_: Any) -> dict[str, Any]:
            (tmp_path / "agent.json").unlink(missing_ok=True)
            if plugin._connection is not None:
                cast(Any, plugin._connection).gone.set()
            for _turn in range(5):
                await asyncio.sleep(0)
            return await super().__call__()

    monkeypatch.setattr(worker_plugin, "ensure_agent", ensure := Slow(tmp_path))
    monkeypatch.setattr(worker_plugin, "AgentConnection", _Connection)
    monkeypatch.setattr(worker_plugin, "living_agent", lambda _: None)  # it is not seen any more
    worker = cast(Worker, SimpleNamespace(name="w", address="tcp://127.0.0.1:1"))
    plugin = AgentPlugin("cluster")
    plugin._folder = tmp_path

    async def story() -> None:
        for _ in range(3):
            await plugin.hold(worker)
        await plugin._let_go()

    asyncio.run(asyncio.wait_for(story(), 10))
    assert ensure.num_started == 3


class _Agents:
    """Starts agents that are not there."""

    def __init__(self, folder: Path) -> None:
        self.num_started = 0
        self._folder = folder

    async def __call__(self, *_: Any) -> dict[str, Any]:
        self.num_started += 1
        (self._folder / "agent.json").write_text(json.dumps({"address": "here"}))
        return {"address": "here"}


class _Connection:
    """To one of them."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    @classmethod
    async def open(cls, *_: Any, **__: Any) -> _Connection:
        return cls()

    async def request(self, *_: Any) -> None: ...

    async def close(self) -> None: ...


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
