"""Talking to an agent, or a cluster's host process: a plain socket for the kernel, asyncio for others."""

from __future__ import annotations

import asyncio
import contextlib
import math
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Decoder, Message, Unreadable, encode, replace
from jupyter_llmcloud.protocol.rpc import R, Reply, Request, Responder, check_reply, result

MAX_READ = 1 << 16  # bytes: for a larger buffer the allocator would ask the system for pages, each time


class AgentConnection:
    """An asyncio client of a unix socket.

    Args:
        responder: answers what the agent asks of this end.
        hear: called with what the agent tells of runs that are followed over this connection.

    Attributes:
        gone: set when the agent's end of the connection has closed.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        address: str,
        responder: Responder | None = None,
        hear: Callable[[Message], None] = lambda _: None,
    ) -> None:
        self.address = address
        self.hear = hear
        self.gone = asyncio.Event()
        self._connection = Connection(reader, writer, _name(address))
        self._responder = responder or Responder("this process")
        self._answering: set[asyncio.Task[None]] = set()
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def open(cls, address: str, timeout_s: float = 10.0, responder: Responder | None = None) -> AgentConnection:
        """Connect to the agent at `address` (the path of its socket). Raises ConnectionLost."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(address)
        except (OSError, TimeoutError) as error:
            raise ConnectionLost(f"{_name(address)} does not answer: {error}.") from None
        return cls(reader, writer, address, responder)

    async def request(self, request: Request[R], timeout_s: float | None = 30.0) -> R:
        """Send a request and wait for its reply; a refusal is raised."""
        return await self._connection.request(request, timeout_s)

    async def _listen(self) -> None:
        try:
            with contextlib.suppress(LLMCloudError):  # told to those who wait for a reply
                async for message in self._connection.messages():
                    if isinstance(message, Request | Unreadable):
                        task = asyncio.create_task(self._responder.serve(message, self._connection.send))
                        self._answering.add(task)
                        task.add_done_callback(self._answering.discard)
                    else:
                        self.hear(message)
        finally:
            self.gone.set()

    async def close(self) -> None:
        """Close the connection."""
        self._listener.cancel()
        self._connection.close()

    async def __aenter__(self) -> AgentConnection:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()


class AgentChannel:
    """A blocking client of an agent, for one thread. Who may be interrupted (Stop) passes a `wake_fd` to `receive`."""

    def __init__(self, address: str, timeout_s: float = 10.0) -> None:
        self.address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(timeout_s)
        try:
            self._sock.connect(address)
        except OSError as error:
            self._sock.close()
            raise ConnectionLost(f"{_name(address)} does not answer: {error}.") from None
        self._sock.setblocking(False)
        self._decoder = Decoder(_name(address))
        self._inbox: deque[Message] = deque()
        self._last = 0  # number of a request

    def send(self, request: Request[Any]) -> int:
        """Send a request with a number of its own, which its reply will carry."""
        number = self._last = self._last + 1
        view = memoryview(encode(replace(request, number=number)))
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                is_ready([self._sock.fileno()], select.POLLOUT, None)
            except OSError as error:
                raise ConnectionLost(f"{_name(self.address)} has gone: {error}.") from None
        return number

    def receive(self, timeout_s: float | None = None, wake_fd: int | None = None) -> Message | None:
        """The next message; None when none came in time or `wake_fd` is readable.

        Raises ConnectionLost, ProtocolError for what is no message of this version, and what the other end refuses the
        connection with.
        """
        watched = [self._sock.fileno()] if wake_fd is None else [self._sock.fileno(), wake_fd]
        while not self._inbox:
            if not is_ready(watched, select.POLLIN, timeout_s):
                return None
            try:
                data = self._sock.recv(MAX_READ)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                raise ConnectionLost(f"{_name(self.address)} has gone.")
            self._inbox.extend(self._decoder.feed(data))
        message = self._inbox.popleft()
        if isinstance(message, Reply):
            check_reply(message, self._last, _name(self.address))
        return message

    def request(self, request: Request[R], timeout_s: float = 60.0, waits_on: Callable[[], bool] = lambda: False) -> R:
        """Send a request and wait for its reply; a refusal is raised. Other messages stay in the inbox.

        `waits_on` is asked each time that `timeout_s` has passed in vain whether to wait as long again. A
        KeyboardInterrupt closes the channel: it may have come in the middle of a message.
        """
        others: list[Message] = []
        deadline = time.monotonic() + timeout_s
        try:
            number = self.send(request)
            while True:
                message = self.receive(max(0.0, deadline - time.monotonic()))
                if message is None and waits_on():
                    deadline = time.monotonic() + timeout_s
                    continue
                if message is None:
                    raise ConnectionLost(f"{_name(self.address)} did not answer in {timeout_s:g} s.")
                if isinstance(message, Reply | Unreadable) and message.reply_to == number:
                    return result(request, message, _name(self.address))
                others.append(message)
        except KeyboardInterrupt:
            self.close()
            raise
        finally:
            self._inbox.extendleft(reversed(others))

    @property
    def has_more(self) -> bool:
        """Whether `receive` has a message at once, since several came together."""
        return bool(self._inbox)

    @property
    def closed(self) -> bool:
        """Whether the socket was closed from here."""
        return self._sock.fileno() < 0

    def fileno(self) -> int:
        """The descriptor of the socket, for `select`."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


def is_ready(watched: list[int], events: int, timeout_s: float | None) -> bool:
    """Wait for descriptors; whether the first of them is ready. Not by `select`, which knows no number above 1023.

    Args:
        events: of `select.poll`.
        timeout_s: None: for as long as it takes.
    """
    poll = select.poll()
    for fd in watched:
        poll.register(fd, events)
    ready = poll.poll(None if timeout_s is None else math.ceil(timeout_s * 1000))
    return any(fd == watched[0] for fd, _ in ready)


def _name(address: str) -> str:
    return f"the node agent at {address}"
