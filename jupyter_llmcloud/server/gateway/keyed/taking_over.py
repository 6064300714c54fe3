"""Connections that are taken from tornado, and given back.

Of the time that a request takes before a replica is asked, tornado's reading of it is the larger part. So a connection
on which a plain request with a key was answered is taken over, by tornado's own `detach`.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any, cast

from tornado.httputil import HTTPHeaders, HTTPMessageDelegate
from tornado.iostream import IOStream, StreamClosedError

from jupyter_llmcloud.server.gateway.keyed.answer import BODY_TIMEOUT_S
from jupyter_llmcloud.server.gateway.keyed.plain_connection import MAX_EARLY, ConnectionOrigin, Host, PlainConnection

if TYPE_CHECKING:
    from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
    from tornado.httputil import HTTPServerConnectionDelegate, HTTPServerRequest

READ_BYTES = 1 << 16  # at once


class PlainConnections:
    """Those of one server.

    Args:
        host: lets their requests in.
        delegate: that tornado asks for each request.
    """

    def __init__(self, host: Host, delegate: HTTPServerConnectionDelegate) -> None:
        self._host = host
        self._delegate = delegate
        self._buffer = bytearray(READ_BYTES)
        self._proven: weakref.WeakSet[IOStream] = weakref.WeakSet()
        self._given_back: weakref.WeakSet[IOStream] = weakref.WeakSet()
        self._taken: set[PlainConnection] = set()
        self._moving: set[asyncio.Task[None]] = set()

    def prove(self, stream: IOStream) -> None:
        """A plain request was answered on it. One with TLS, or that was given back before, stays where it is."""
        if type(stream) is IOStream:
            self._proven.add(stream)

    def may_take(self, stream: IOStream) -> bool:
        """Whether its next plain request is the first one of ours."""
        return stream in self._proven

    def take(self, request: HTTPServerRequest, length: int) -> HTTPMessageDelegate:
        """What tornado tells of a request with which its connection is taken over."""
        return _TakenOver(self, request, length)

    def move(self, stream: IOStream, head: bytes, length: int, params: Any, context: Any) -> None:
        """Go on with it, as soon as the body that belongs to a head is there."""
        origin = ConnectionOrigin(self._delegate, params, context, stream.max_buffer_size)
        task = asyncio.ensure_future(self._move(stream, head, length, origin))
        self._moving.add(task)
        task.add_done_callback(self._moving.discard)

    async def _move(self, stream: IOStream, head: bytes, length: int, origin: ConnectionOrigin) -> None:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await stream.read_bytes(length)
            more: Any = stream.read_bytes(MAX_EARLY, partial=True)  # that tornado has read already
            begun = head + body + (more.result() if more.done() else b"")
            sock = stream.socket.dup()
        except (TimeoutError, StreamClosedError):
            return
        finally:
            stream.close()  # a connection ends with the last one of its descriptors
        connection = PlainConnection(self._host, origin, begun, self._buffer, self._ended)
        self._taken.add(connection)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
        except OSError:
            self._taken.discard(connection)
            sock.close()

    def _ended(self, connection: PlainConnection, stream: IOStream | None) -> None:
        self._taken.discard(connection)
        if stream is not None:
            self._given_back.add(stream)

    def close(self) -> None:
        """The server ends."""
        for task in self._moving:
            task.cancel()
        for connection in list(self._taken):
            connection.close()
        for stream in list(self._given_back):
            stream.close()


class _TakenOver(HTTPMessageDelegate):
    def __init__(self, connections: PlainConnections, request: HTTPServerRequest, length: int) -> None:
        self._connections = connections
        self._request = request
        self._length = length

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        """No more is heard of tornado."""
        request = self._request
        connection = cast("HTTP1Connection", request.connection)
        server = cast("HTTP1ServerConnection", request.server_connection)
        context = connection.context
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.get_all())
        head = f"{request.method} {request.uri} {request.version}\r\n{lines}\r\n".encode("latin-1")
        self._connections.move(connection.detach(), head, self._length, server.params, context)
