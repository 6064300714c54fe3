"""A client of the events of a server, in the loop of a test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

DEADLINE_S = 20.0


class EventClient:
    """One connection. It keeps the state that it is told of, as a front end does.

    Attributes:
        items: of each topic, by their ids.
        messages: everything that came.
        columns: of each series of a watched run: {name: [(step, mean)]}.
    """

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self.connection = connection
        self.messages: list[dict[str, Any]] = []
        self.items: dict[str, dict[str, dict[str, Any]]] = {}
        self.cursor = 0
        self.epoch = ""
        self.info: dict[str, Any] = {}
        self.columns: dict[str, list[tuple[float, float | None]]] = {}
        self.output: list[dict[str, Any]] = []
        self.skipped = 0
        self.acknowledges = True

    @classmethod
    async def connect(cls, url: str, token: str, **headers: str) -> EventClient:
        """Raises HTTPClientError when the server refuses."""
        address = url.replace("http://", "ws://") + "/llmcloud/api/events"
        headers = {**({"Authorization": f"token {token}"} if token else {}), **headers}
        client = cls(await websocket_connect(HTTPRequest(address, headers=headers), max_message_size=1 << 28))
        await client.until(lambda: client.epoch)
        return client

    async def say(self, kind: str, **fields: Any) -> None:
        await self.connection.write_message(json.dumps({"type": kind, **fields}))

    async def read(self, timeout_s: float = DEADLINE_S) -> dict[str, Any] | None:
        """The next message, which is taken in; None when the connection has ended."""
        text = await asyncio.wait_for(self.connection.read_message(), timeout_s)
        if text is None:
            return None
        message = json.loads(text)
        self.messages.append(message)
        await self._take(message)
        return message

    async def until(self, condition: Callable[[], Any], timeout_s: float = DEADLINE_S) -> Any:
        """Read until it is true."""
        async with asyncio.timeout(timeout_s):
            while not (found := condition()):
                assert await self.read(timeout_s) is not None, "the connection has ended"
        return found

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]

    async def close(self) -> None:
        self.acknowledges = False
        self.connection.close()
        while await self.read() is not None:
            pass

    async def _take(self, message: dict[str, Any]) -> None:
        ids = {"clusters": "name", "worlds": "world_id", "runs": "run_id", "endpoints": "name", "keys": "id"}
        kind = message["type"]
        if kind == "hello":
            self.epoch = message["epoch"]
        elif kind == "snapshot":
            self.items[message["topic"]] = {item[ids[message["topic"]]]: item for item in message["items"]}
        elif kind == "changed":
            self.items[message["topic"]][message["item"][ids[message["topic"]]]] = message["item"]
        elif kind == "removed":
            del self.items[message["topic"]][message["id"]]
        elif kind == "run_info":
            self.info = message["info"]
        elif kind == "run_series":
            for tail in message["series"]:
                kept = self.columns.get(tail["name"], [])[: tail["from"]]
                assert len(kept) == tail["from"], "a tail that does not fit"
                self.columns[tail["name"]] = kept + list(zip(tail["step"], tail["mean"], strict=True))
        elif kind == "run_output":
            self.output += message["records"]
            self.skipped += message["skipped"]
        if kind in ("snapshot", "changed", "removed", "synced"):
            self.cursor = max(self.cursor, message["cursor"])
        elif "run_id" in message and "cursor" in message and self.acknowledges:
            await self.say("ack", cursor=message["cursor"])
