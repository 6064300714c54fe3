"""A request that came with a key, as tornado reads it, answered without a handler of Jupyter's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol, cast

from tornado.httputil import HTTPHeaders, HTTPMessageDelegate

from jupyter_llmcloud.server.gateway.keyed.answer import BODY_TIMEOUT_S, Admittance, Asked, KeyedAnswer

if TYPE_CHECKING:
    from tornado.http1connection import HTTP1Connection
    from tornado.httputil import HTTPServerRequest
    from tornado.iostream import IOStream


class HandlersBehind(Admittance, Protocol):
    """Whoever lets requests in, and has handlers for those that are refused."""

    async def refuse(self, request: HTTPServerRequest, route: str, body: bytes) -> None:
        """Have a handler answer, who says why."""

    def proven(self, stream: IOStream) -> None:
        """A request on this connection was answered."""


class TornadoWire:
    """A connection of tornado's."""

    def __init__(self, connection: HTTP1Connection) -> None:
        self._connection = connection

    def begin(self) -> None:
        """What is written shall not wait for more."""
        self._connection.stream.set_nodelay(True)

    def write(self, data: bytes) -> bool:
        """Some of the answer; whether the system has taken all of it."""
        stream = self._connection.stream
        self._connection.write(data)
        return not (stream.writing() or stream.closed())

    async def drained(self) -> None:
        """Wait until it has."""
        await self._connection.write(b"")

    def is_closed(self) -> bool:
        """Whether nobody is there any more."""
        return self._connection.stream.closed()

    def finish(self) -> None:
        """That was all of it."""
        self._connection.finish()

    def close(self) -> None:
        """End it."""
        self._connection.close()


class KeyedRequest(HTTPMessageDelegate):
    """One request, from its headers on.

    Args:
        behind: who has let it in.
        request: as tornado has read it.
    """

    def __init__(self, behind: HandlersBehind, request: HTTPServerRequest, asked: Asked) -> None:
        self._behind = behind
        self._request = request
        self._connection = cast("HTTP1Connection", request.connection)
        self._asked = asked
        self._body = bytearray()  # it may come byte by byte
        self._answer = KeyedAnswer(behind, asked, TornadoWire(self._connection))
        self._late: asyncio.TimerHandle | None = None  # ends a connection whose body does not come
        self._task: asyncio.Task[None] | None = None

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        """The body is to come."""
        self._late = asyncio.get_running_loop().call_later(BODY_TIMEOUT_S, self._connection.close)

    def data_received(self, chunk: bytes) -> None:
        """Some of it."""
        self._body += chunk

    def finish(self) -> None:
        """All of it is here."""
        self._wait_no_longer()
        self._connection.set_close_callback(self._answer.hung_up)
        self._task = asyncio.ensure_future(self._give_answer())

    def on_connection_close(self) -> None:
        """The rest of it does not come."""
        self._wait_no_longer()

    def _wait_no_longer(self) -> None:
        if self._late is not None:
            self._late.cancel()

    async def _give_answer(self) -> None:
        body = bytes(self._body)
        self._body.clear()  # it is not held twice
        is_refused = False
        try:
            if (let_in := self._answer.let_in(body)) is not None:
                stream = self._connection.stream
                await self._answer.give(body, *let_in)
                self._behind.proven(stream)
                return
            is_refused = True
            await self._behind.refuse(self._request, self._asked.route, body)
        except Exception as error:
            self._fail(error, is_refused)

    def _fail(self, error: Exception, is_refused: bool) -> None:
        if is_refused:  # whoever refuses writes a head
            self._answer.leave_head()
        self._answer.fail(error)
