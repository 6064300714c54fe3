"""What one client is told, by values: no sockets, no runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from jupyter_llmcloud.cluster.agent_info import AgentView
from jupyter_llmcloud.protocol.agent_messages import AgentResources
from jupyter_llmcloud.protocol.http.events import Hello, WatchRun, write
from jupyter_llmcloud.server.events import stream
from jupyter_llmcloud.server.events.hub import EventHub
from jupyter_llmcloud.server.events.resources import seen_at


class QuietWatch:
    """A run of which there is nothing to tell."""

    is_gone = False

    def due_in(self, now: float) -> None:
        """Nothing is due."""


class RunsOfOthers:
    """The events of a server, as far as a stream needs them."""

    def __init__(self) -> None:
        self.hub = EventHub("e1")
        self.watched: list[str] = []

    def hello(self) -> Hello:
        return Hello(epoch="e1", version="1", heartbeat_s=20)

    def watch(self, run_id: str, points: int, on_news: Callable[[], None]) -> QuietWatch:
        self.watched.append(run_id)
        return QuietWatch()

    def unwatch(self, run_id: str, on_news: Callable[[], None]) -> None:
        self.watched.remove(run_id)


async def test_all_runs_of_a_long_notebook_are_watched_and_each_that_is_not_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service, told = RunsOfOthers(), asyncio.Queue[Any]()

    async def send(data: bytes) -> None:
        told.put_nowait(msgspec.json.decode(data))

    client = stream.EventStream(service, send)  # type: ignore[arg-type]
    for number in range(120):
        client.receive(write(WatchRun(run_id=f"r-{number}")))
    assert len(service.watched) == 120
    monkeypatch.setattr(stream, "MAX_WATCHES", 120)
    for number in range(120, 150):
        client.receive(write(WatchRun(run_id=f"r-{number}")))
    task = asyncio.ensure_future(client.run())
    async with asyncio.timeout(30):
        found = [await told.get() for _ in range(31)]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    refused = [message["run_id"] for message in found if message["type"] == "refused"]
    assert refused == [f"r-{number}" for number in range(120, 150)]


def test_when_a_host_was_looked_at_is_told_by_the_clock_of_the_server() -> None:
    resources = AgentResources(host="h", t=1000.0, num_cores=1, cpu=0.0, memory_bytes=1, total_memory_bytes=2)
    views = seen_at([AgentView("a", resources=resources), AgentView("b", silence="silent")], 1300.0)
    assert [view.resources.t if view.resources else None for view in views] == [1300.0, None]
