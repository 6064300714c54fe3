"""A connection whose requests come with a key, read without tornado as long as nothing in them needs judging.

What is not a plain request with a key, in any respect, is given back to tornado unread, and the connection with it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from tornado.http1connection import HTTP1ServerConnection
from tornado.iostream import IOStream

from jupyter_llmcloud.server.gateway.keyed.answer import BODY_TIMEOUT_S, Admittance, KeyedAnswer
from jupyter_llmcloud.server.gateway.keyed.request_reader import Judge, RequestReader

if TYPE_CHECKING:
    from tornado.http1connection import HTTP1ConnectionParameters
    from tornado.httputil import HTTPServerConnectionDelegate

IDLE_S = 3600.0  # as tornado, where a server says nothing else
MAX_EARLY = 1 << 16  # bytes of the next request that are taken while one is answered


class Host(Admittance, Judge, Protocol):
    """Who tells plain requests from others, and lets them in."""


class GivenBack(IOStream):
    """A connection of tornado's of which something was read before."""

    def __init__(self, sock: socket.socket, begun: bytes, max_buffer_size: int) -> None:
        self._begun = begun
        super().__init__(sock, max_buffer_size=max_buffer_size)

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        """First what was read before."""
        if not self._begun:
            return super().read_from_fd(buf)
        number = min(len(buf), len(self._begun))
        buf[:number], self._begun = self._begun[:number], self._begun[number:]
        return number


class ConnectionOrigin(NamedTuple):
    """Where a connection was taken over from, and goes back to.

    Attributes:
        delegate: that tornado asks for each of its requests.
        params: of tornado's connections there.
        context: who is at the other end.
        max_buffer_size: of what tornado reads on it.
    """

    delegate: HTTPServerConnectionDelegate
    params: HTTP1ConnectionParameters
    context: Any
    max_buffer_size: int

    @property
    def address(self) -> str:
        """Of who is there."""
        return str(self.context.remote_ip)

    @property
    def idle_s(self) -> float:
        """How long nothing may come."""
        return self.params.header_timeout or IDLE_S

    def take_back(self, sock: socket.socket, begun: bytes) -> IOStream:
        """Let tornado go on, with what was read already."""
        stream = GivenBack(sock, begun, self.max_buffer_size)
        HTTP1ServerConnection(stream, self.params, self.context).start_serving(self.delegate)
        return stream


class PlainConnection(asyncio.BufferedProtocol):
    """One connection, with one request at a time. It is the wire of its answers.

    Args:
        host: lets requests in.
        origin: where it goes back to with anything else.
        begun: what was read of it.
        buffer: into which it is read. It may be that of other connections too: what is read is taken out at once.
        ended: is told when it has gone; of one that was given back, tornado's stream.
    """

    def __init__(
        self,
        host: Host,
        origin: ConnectionOrigin,
        begun: bytes,
        buffer: bytearray,
        ended: Callable[[PlainConnection, IOStream | None], None],
    ) -> None:
        self._host = host
        self._origin = origin
        self._ended = ended
        self._buffer = memoryview(buffer)
        self._transport: asyncio.Transport | None = None  # None: it is gone
        self._reader = RequestReader(host, origin.address, begun)
        self._answer: KeyedAnswer | None = None
        self._task: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0  # when it was begun to wait

    # --- what the loop tells ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is ours."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=0)
        self._wait()
        self._look()
        self._go_on()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where it is read into: memory for each reading would take as long to be had as all that is done with it."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """More of a request, or of the next one."""
        self._reader.feed(self._buffer[:nbytes])
        if not self._is_answering:
            self._go_on()
        elif self._reader.num_unread > MAX_EARLY and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The system has taken everything."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        """Nobody is there any more."""
        self._leave(None)

    def _leave(self, stream: IOStream | None) -> None:
        if self._transport is None:
            return
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        if self._answer is not None:
            self._answer.hung_up()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._ended(self, stream)

    def _look(self) -> None:
        """Whether what is waited for, a request or the rest of one, has come in time."""
        loop = asyncio.get_running_loop()
        patience_s = self._origin.idle_s if self._reader.asked is None else BODY_TIMEOUT_S
        left = patience_s if self._answer is not None else self._since + patience_s - loop.time()
        if left <= 0:
            self.close()
        else:
            self._timer = loop.call_later(left, self._look)

    # --- requests ---

    @property
    def _is_answering(self) -> bool:
        """Whether an answer is not on its way to the client as a whole: what comes next waits for that."""
        return self._answer is not None or (self._transport is not None and self._transport.get_write_buffer_size() > 0)

    def _next(self) -> None:
        """Read on, once the client has what it has asked for before."""
        if self._transport is None or self._is_answering:
            return
        self._transport.resume_reading()
        if self._reader.num_unread:
            self._go_on()

    def _go_on(self) -> None:
        """Begin with the next request as soon as all of it is here."""
        reader = self._reader
        is_new = reader.asked is None
        if is_new and not reader.read_head():
            self._give_back()
        elif (body := reader.body()) is not None:
            self._begin(body)
        elif is_new:
            self._wait()

    def _wait(self) -> None:
        """From now on, for the next request or the rest of one."""
        self._since = asyncio.get_running_loop().time()
        if self._reader.asked is not None and self._timer is not None:  # sooner than was thought
            self._timer.cancel()
            self._look()

    def _begin(self, body: bytes) -> None:
        assert self._reader.asked is not None
        answer = KeyedAnswer(self._host, self._reader.asked, self)
        try:
            let_in = answer.let_in(body)
        except Exception:  # a handler meets it as well, and says so
            let_in = None
        if let_in is None:
            self._give_back()
            return
        self._reader.take()
        self._answer = answer
        self._task = asyncio.get_running_loop().create_task(answer.give(body, *let_in))

    def _give_back(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        sock = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._leave(self._origin.take_back(sock, self._reader.rest()))
        transport.abort()

    # --- the wire of an answer ---

    def begin(self) -> None:
        """Nothing here waits for more."""

    def write(self, data: bytes) -> bool:
        """Some of it; whether the system has taken all of it."""
        if self._transport is None:
            return False
        self._transport.write(data)
        return not (self._transport.get_write_buffer_size() or self._transport.is_closing())

    async def drained(self) -> None:
        """Wait until it has."""
        while self._transport is not None and self._transport.get_write_buffer_size():
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        if self._transport is None:
            raise ConnectionResetError

    def is_closed(self) -> bool:
        """Whether nobody is there any more."""
        return self._transport is None or self._transport.is_closing()

    def finish(self) -> None:
        """That was all of it."""
        self._answer = None
        self._wait()
        self._next()

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.abort()
