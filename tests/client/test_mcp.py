"""`jupyter llmcloud mcp`: a real client of the protocol, a real process that serves tools, a real server behind it."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters

from jupyter_llmcloud.server.cli import main
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunStore
from tests.server.test_server_routes import make_run
from tests.support.server_parts import Server

pytest_plugins = ["tests.support.server_fixtures"]
READ = {"list_runs", "show_run", "tail_log", "metrics", "stacks", "clusters", "endpoints"}
CHANGE = {"stop_run", "scale_cluster", "stop_endpoint"}


@asynccontextmanager
async def tools(server: Server, *words: str) -> AsyncIterator[Client]:
    """A client of the tools of this server."""
    environment = {**os.environ, "LLMCLOUD_SERVER_URL": server.url, "LLMCLOUD_SERVER_TOKEN": server.token}
    command = ["-m", "jupyter_llmcloud.server.cli", "mcp", *words]
    async with Client(StdioServerParameters(command=sys.executable, args=command, env=environment)) as client:
        yield client


async def call(client: Client, tool: str, /, **arguments: Any) -> Any:
    """What a tool returns; a text for one that writes text."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    text = result.content[0].text
    return json.loads(text) if text.startswith("{") else text


async def refusal(client: Client, tool: str, /, **arguments: Any) -> str:
    """The message with which a tool refuses."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return str(result.content[0].text)


async def test_it_reads_runs_their_logs_and_metrics_and_changes_nothing_unless_allowed(server: Server) -> None:
    record = make_run(not_finite={"loss": {"count": 1, "first": 3, "since": 3}})
    folder = RunStore().folder(record.run_id)
    logs = JournalWriter(folder.logs(1))
    logs.append([{"kind": "stdout", "text": "half of "}, {"kind": "stdout", "text": "a \x1b[31mred\x1b[0m line\n"}])
    logs.close()
    metrics = JournalWriter(folder.metrics(0))
    metrics.append([{"step": 3, "values": {"loss": math.nan, "lr": 0.1}}])
    metrics.close()
    async with tools(server) as client:
        there = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(there) == READ
        assert all(tool.description and tool.annotations.read_only_hint for tool in there.values())
        [run] = (await call(client, "list_runs"))["runs"]
        assert (run["name"], run["state"]) == ("train", "finished")
        assert (await call(client, "list_runs", state="active"))["runs"] == []
        assert (await call(client, "show_run", run="train"))["source"] == "print(1)\n"
        log = await call(client, "tail_log", run="train", rank=1, lines=2)
        assert log.splitlines() == ["[1] line 4 of rank 1", "[1] half of a red line"]
        told = await call(client, "metrics", run="train", names=["loss"], points=2)
        assert told["series"] == {"loss": [[3, 0, "nan"]]}
        assert told["not_finite"]["loss"]["count"] == 1
        assert "'lss'" in await refusal(client, "metrics", run="train", names=["lss"])
        assert "NotFound: there is no run 'nothing'" in await refusal(client, "show_run", run="nothing")
        assert "lines 0 is not possible" in await refusal(client, "tail_log", run="train", lines=0)
        assert "is finished" in await refusal(client, "stacks", name="train")
        [world] = (await call(client, "clusters"))["worlds"]
        assert world["holder"] == "project/a.ipynb"
        assert (await call(client, "endpoints")) == {"endpoints": []}
        assert "stop_run" in await refusal(client, "stop_run", run="train")


async def test_it_changes_what_it_is_allowed_to(server: Server, model: Path) -> None:
    await server.serve(model)
    await server.ask("POST", "llmcloud/api/clusters", {"name": "c1"})
    record = make_run(state="running", agent=server.agent.address)
    async with tools(server, "--allow-changes") as client:
        there = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(there) == READ | CHANGE
        assert all(there[name].annotations.read_only_hint is False for name in CHANGE)
        assert await call(client, "stop_run", run="train") == {"state": "stopping"}
        assert server.agent.stopped_runs == [record.run_id]
        assert (await call(client, "scale_cluster", name="c1", workers=3))["num_workers"] == 3
        assert (await call(client, "stop_endpoint", name="tiny"))["state"] == "stopped"
    audit = [row["action"] for row in server.context.state.audit()]
    assert {"run.stop", "cluster.scale", "endpoint.stop"} <= set(audit)


async def test_a_server_that_is_not_there_is_said_and_the_tools_stay(server: Server) -> None:
    server.url = "http://127.0.0.1:9"
    async with tools(server) as client:
        for _ in range(2):
            assert "does not answer" in await refusal(client, "list_runs")


def test_without_the_package_it_is_said_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    assert main(["mcp"]) == 1
    assert "pip install 'jupyter-llmcloud[mcp]'" in capsys.readouterr().err
