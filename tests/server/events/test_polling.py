"""The events without a websocket: the same messages, told once more where an answer was lost, and ended by silence."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from jupyter_llmcloud.server.events import polling
from tests.server.events.test_websocket import make_run
from tests.support.server_parts import Server, until

pytest_plugins = ["tests.support.server_fixtures"]

SUBSCRIBE = {"type": "subscribe", "topics": ["keys"], "epoch": "", "cursor": 0}


class Client:
    """Asks as a page does that no websocket reaches."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.session, self.received = "", 0

    async def ask(self, *messages: dict[str, Any], wait_s: float = 5.0, received: int | None = None) -> Any:
        """What there is to tell."""
        number = self.received if received is None else received
        query = f"session={self.session}&received={number}&wait_s={wait_s}&messages={json.dumps(messages)}"
        answer = await self.server.ask("GET", f"llmcloud/api/events/poll?{query}")
        assert answer.status_code == 200, answer.text
        told = answer.json()
        self.session, self.received = told["session"], told["number"]
        return told["messages"]

    async def until(self, kind: str, *messages: dict[str, Any]) -> dict[str, Any]:
        """Ask until there is a message of a kind."""
        said = messages
        async with asyncio.timeout(20):
            while True:
                for message in await self.ask(*said):
                    if message["type"] == kind:
                        return dict(message)
                said = ()


async def test_what_is_followed_is_told_as_on_the_websocket(server: Server) -> None:
    make_run()
    client = Client(server)
    assert [message["type"] for message in await client.ask()] == ["hello"]
    assert (await client.until("snapshot", SUBSCRIBE))["items"] == []
    began = time.monotonic()
    asked = asyncio.ensure_future(client.ask(wait_s=20.0))
    await server.key()
    (changed,) = await asked
    assert changed["type"] == "changed" and changed["item"]["state"] == "valid"
    assert time.monotonic() - began < 10, "it was told by the end of the wait only"
    info = (await client.until("run_info", {"type": "watch", "run_id": "train-1", "points": 100}))["info"]
    assert info["name"] == "train" and info["state"] == "finished"
    assert await client.ask(wait_s=0) == []


async def test_an_answer_that_was_lost_is_told_once_more(server: Server) -> None:
    client = Client(server)
    await client.ask()
    before = client.received
    told = await client.until("snapshot", SUBSCRIBE)
    assert await client.ask(received=before, wait_s=0) == [told]
    assert await client.ask(wait_s=0) == []


async def test_of_two_requests_at_once_the_newer_is_answered_and_nothing_is_lost(server: Server) -> None:
    client = Client(server)
    await client.ask()
    older = asyncio.ensure_future(client.ask(wait_s=20.0))
    await asyncio.sleep(0)  # it is on its way
    told = await client.until("snapshot", SUBSCRIBE)
    assert told["topic"] == "keys"
    assert await asyncio.wait_for(older, 10) == []


async def test_what_is_not_understood_is_refused_and_the_session_stays(server: Server) -> None:
    client = Client(server)
    await client.ask()
    assert "dance" in (await client.until("refused", {"type": "dance"}, SUBSCRIBE))["message"]
    wrong = await server.ask("GET", f"llmcloud/api/events/poll?session={client.session}&messages=nonsense")
    assert wrong.status_code == 400 and "'nonsense'" in wrong.json()["message"]


async def test_who_does_not_ask_any_more_is_forgotten_and_nothing_is_read_for_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(server)
    await client.until("snapshot", SUBSCRIBE)
    source = server.context.events.source("keys")
    assert source.is_read and len(server.context.polls) == 1
    monkeypatch.setattr(polling, "LEASE_S", 0.05)
    await client.ask(wait_s=0)
    await until(lambda: not source.is_read, "the topic is read no more")
    assert len(server.context.polls) == 0
    gone = await server.ask("GET", f"llmcloud/api/events/poll?session={client.session}")
    assert gone.status_code == 404 and "begin another one" in gone.json()["message"]


async def test_a_client_that_does_not_fetch_holds_the_stream_up_and_takes_no_memory(server: Server) -> None:
    session = polling.PollSession(server.context.events, "", lambda: None)
    for _ in range(3 * polling.MAX_WAITING):
        await session.ask(0, [b'{"type":"dance"}'], 0)
    await asyncio.sleep(0.05)
    _, told = await session.ask(0, [], 0)
    assert len(told) <= polling.MAX_WAITING
    session.end()
