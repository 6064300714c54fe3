"""The server starts runs by itself: what is refused, what becomes of a start that is given up, who owns it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from jupyter_llmcloud.errors import Busy, ConnectionLost, UsageError
from jupyter_llmcloud.protocol.agent_messages import Describe, Execute
from jupyter_llmcloud.server.cluster_access import ClusterAccess, Identity
from jupyter_llmcloud.storage.runs import RunRecord
from tests.server.test_server_routes import make_run
from tests.support.server_parts import Server, until

pytest_plugins = ["tests.support.server_fixtures"]
RUNS = "llmcloud/api/runs"


class NoRoom:
    """In place of a cluster's: there is none."""

    def __init__(self) -> None:
        self.tickets: list[str] = []

    async def __call__(self, cluster: str | None, num_ranks: int | None, ticket: str = "", **_: Any) -> dict[str, Any]:
        self.tickets.append(ticket)
        raise Busy("2 slots are taken.")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "source must be str"),
        ({"source": "if"}, 400, "SyntaxError"),
        ({"source": "\0"}, 400, "Nothing was started"),
        ({"source": "-" * 100_000 + "1"}, 400, "Nothing was started"),
        ({"source": "1", "sepc": {}}, 400, "field 'sepc' is not known here: source, spec, script are."),
        ({"source": "1", "spec": {"pull": "x"}}, 400, "spec.pull is not known here: nproc, cluster, name,"),
        ({"source": "1", "spec": {"precision": "fp7"}}, 400, "Choose one of no, bf16, fp16, fp8"),
        ({"source": "1", "spec": {"resume": "nothing"}}, 404, "nothing"),
        ({"source": "1", "spec": {"nproc": 5}}, 409, "-n 5"),
        ({"source": "1", "script": {"argv": []}}, 400, "script.argv is not known here"),
        ({"source": "1", "script": {"arguments": [1]}}, 400, "script.arguments must be str, not 1"),
    ],
)
async def test_what_cannot_be_started_is_refused_by_name(
    server: Server, body: dict[str, Any], status: int, words: str
) -> None:
    answer = await server.ask("POST", RUNS, body)
    assert answer.status_code == status and words in answer.json()["message"]
    assert server.context.runs.list() == []


async def test_a_run_waits_for_its_turn_with_one_ticket_and_can_be_stopped(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = NoRoom()
    monkeypatch.setattr(server.pool, "place", room)
    told = (await server.ask("POST", RUNS, {"source": "1", "spec": {"name": "waits", "seed": 3}})).json()
    await until(lambda: len(room.tickets) > 2, "it asks again")
    assert len(set(room.tickets)) == 1
    seen = (await server.ask("GET", f"{RUNS}/waits")).json()
    assert (seen["state"], seen["spec"], seen["source"]) == ("queued", {"name": "waits", "seed": 3}, "1")
    assert [entry["why"] for entry in seen["history"] if "why" in entry] == ["waits for free slots. 2 slots are taken."]
    assert (await server.ask("POST", f"{RUNS}/{told['run_id']}/stop")).json() == {"state": "stopped"}
    assert server.context.runs.find("waits").read().state == "stopped"
    assert len(server.context.starts) == 0


async def test_nothing_is_started_for_who_has_hung_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, given_up = asyncio.Event(), asyncio.Event()

    async def place(*_: Any, **__: Any) -> None:
        asked.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            given_up.set()

    monkeypatch.setattr(server.pool, "place", place)
    with pytest.raises(httpx.ReadTimeout):
        await server.ask("POST", RUNS, {"source": "1"}, timeout=0.5)
    await asyncio.wait_for(asked.wait(), 20)
    await asyncio.wait_for(given_up.wait(), 20)
    assert server.context.runs.list() == []


async def test_a_run_whose_server_has_gone_before_it_began_is_lost(server: Server) -> None:
    make_run("orphan", "queued", agent="", owner="server:0123456789abcdef")
    told = (await server.ask("GET", f"{RUNS}/orphan")).json()
    assert told["state"] == "lost"
    record: RunRecord = server.context.runs.find("orphan").read()
    assert record.state == "lost" and "the server that was to start it has gone." in str(record.history)


async def test_a_run_that_cannot_be_brought_to_its_agent_has_failed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def place(*_: Any, **__: Any) -> dict[str, Any]:
        agents = [{"address": "/nowhere/agent.sock", "home": "/nowhere/agent.sock", "num_ranks": 1}]
        return {"cluster": "c", "world_id": "w", "agents": agents, "num_ranks": 1, "started": False}

    monkeypatch.setattr(server.pool, "place", place)
    told = (await server.ask("POST", RUNS, {"source": "1"})).json()
    folder = server.context.runs.folder(told["run_id"])
    await until(lambda: folder.read().state == "failed", "it has failed")
    assert folder.read().errors[0]["ename"] == "ConnectionLost"


async def test_a_run_whose_agent_took_it_in_the_moment_in_which_the_connection_broke_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told as failed, and trained on."""

    async def place(*_: Any, **__: Any) -> dict[str, Any]:
        agents = [{"address": "/there/agent.sock", "home": "/there/agent.sock", "num_ranks": 1}]
        return {"cluster": "c", "world_id": "w", "agents": agents, "num_ranks": 1, "started": False}

    class Agent:
        async def __aenter__(self) -> Agent:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def request(self, message: Any, timeout_s: float | None = None) -> Any:
            if isinstance(message, Describe):
                return SimpleNamespace(worlds=[{"world_id": "w"}])
            if isinstance(message, Execute):
                folder = server.context.runs.folder(message.run_id)
                record = folder.read()
                record.state = "running"
                folder.write(record)
                raise ConnectionLost("the node agent has gone.")
            return None

    async def open_agent(_: str) -> Any:
        return Agent()

    monkeypatch.setattr(server.pool, "place", place)
    monkeypatch.setattr(server.context.clusters, "open_agent", open_agent)
    told = (await server.ask("POST", RUNS, {"source": "1"})).json()
    await until(lambda: not len(server.context.starts), "it is on its way no more")
    assert server.context.runs.folder(told["run_id"]).read().state == "running"
    assert (await server.ask("GET", f"{RUNS}/{told['run_id']}")).json()["state"] == "running"


async def test_who_ends_the_server_ends_what_waits(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.pool, "place", NoRoom())
    told = (await server.ask("POST", RUNS, {"source": "1"})).json()
    await server.context.starts.close()
    assert server.context.runs.folder(told["run_id"]).read().state == "stopped"


async def test_a_runtime_folder_that_is_open_to_others_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setenv("LLMCLOUD_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(UsageError, match=r"\(0700\)\. Remove it, or set LLMCLOUD_RUNTIME_DIR"):
        await ClusterAccess(Identity()).pool()
