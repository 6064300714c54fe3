"""Talking to an agent from elsewhere: a plain socket for the kernel, asyncio for the server."""

from __future__ import annotations

import asyncio
import itertools
import select
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from jupyter_llmcloud import errors
from jupyter_llmcloud.protocol.agent_messages import Done, FindRoom, FindStandBy, Refused
from jupyter_llmcloud.protocol.frames import Decoder, Message, encode

MAX_READ = 1 << 16  # bytes: for a larger buffer the allocator would ask the system for pages, each time


def raise_refusal(refused: Refused) -> None:
    """Raise a Refused as the class of `errors` that it names."""
    kind = getattr(errors, refused.error, errors.LLMCloudError)
    raise (kind if isinstance(kind, type) and issubclass(kind, errors.LLMCloudError) else errors.LLMCloudError)(
        refused.reason
    )


class AgentConnection:
    """An asyncio client of an agent's unix socket.

    Attributes:
        answer: carries out what the agent asks of this end.
        gone: set when the agent's end of the connection has closed.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        self.address = address
        self._writer = writer
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._listener = asyncio.create_task(self._listen(reader))
        self.answer: Callable[[Message], Awaitable[Message]] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self.gone = asyncio.Event()

    @classmethod
    async def open(cls, address: str, timeout_s: float = 10.0) -> AgentConnection:
        """Connect to the agent at `address` (the path of its socket). Raises ConnectionLost."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(address)
        except (OSError, TimeoutError) as error:
            raise errors.ConnectionLost(f"the node agent at {address} does not answer: {error}.") from None
        return cls(reader, writer, address)

    async def request(self, message: Message, timeout_s: float = 30.0) -> Done:
        """Send a request and wait for its answer; a refusal is raised."""
        number = next(self._ids)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._writer.write(encode(message, reply_to=number))
            async with asyncio.timeout(timeout_s):
                reply = await answer
        except TimeoutError:
            raise errors.ConnectionLost(
                f"the node agent at {self.address} did not answer in {timeout_s:g} s."
            ) from None
        finally:
            self._waiting.pop(number, None)
        if isinstance(reply, Refused):
            raise_refusal(reply)
        assert isinstance(reply, Done)
        return reply

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        decoder = Decoder()
        gone = Refused(error="ConnectionLost", reason=f"the node agent at {self.address} has gone.")
        try:
            while data := await reader.read(1 << 20):
                for message in decoder.feed(data):
                    if isinstance(message, Refused) and not message.reply_to:
                        gone = message  # a bridge says why it leads nowhere
                    if isinstance(message, FindRoom | FindStandBy):
                        task = asyncio.create_task(self._serve(message))
                        self._answering.add(task)
                        task.add_done_callback(self._answering.discard)
                        continue
                    waiting = self._waiting.get(message.reply_to)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(message)
        except (ConnectionError, ValueError):
            pass
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(gone)
        self.gone.set()

    async def _serve(self, message: Message) -> None:
        try:
            if self.answer is None:
                raise errors.UsageError(f"nobody answers {type(message).__name__} here.")
            reply = await self.answer(message)
        except errors.LLMCloudError as error:
            reply = Refused(error=type(error).__name__, reason=str(error))
        except Exception as error:
            reply = Refused(reason=f"{type(error).__name__}: {error}")
        self._writer.write(encode(reply, reply_to=message.reply_to))

    async def close(self) -> None:
        """Close the connection."""
        self._listener.cancel()
        self._writer.close()

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
            raise errors.ConnectionLost(f"the node agent at {address} does not answer: {error}.") from None
        self._sock.setblocking(False)
        self._decoder = Decoder()
        self._inbox: deque[Message] = deque()
        self._ids = itertools.count(1)

    def send(self, message: Message) -> int:
        """Send a message with a number of its own, which its answer will carry."""
        number = next(self._ids)
        view = memoryview(encode(message, reply_to=number))
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                select.select([], [self._sock], [])
            except OSError as error:
                raise errors.ConnectionLost(f"the node agent at {self.address} has gone: {error}.") from None
        return number

    def receive(self, timeout_s: float | None = None, wake_fd: int | None = None) -> Message | None:
        """The next message; None when none came in time or `wake_fd` is readable. Raises ConnectionLost."""
        watched: list[Any] = [self._sock] if wake_fd is None else [self._sock, wake_fd]
        while not self._inbox:
            readable, _, _ = select.select(watched, [], [], timeout_s)
            if self._sock not in readable:
                return None
            try:
                data = self._sock.recv(MAX_READ)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                raise errors.ConnectionLost(f"the node agent at {self.address} has gone.")
            self._inbox.extend(self._decoder.feed(data))
        return self._inbox.popleft()

    def request(self, message: Message, timeout_s: float = 60.0) -> Done:
        """Send a request and wait for its answer; a refusal is raised. Other messages stay in the inbox.

        A KeyboardInterrupt closes the channel: it may have come in the middle of a message.
        """
        others: list[Message] = []
        deadline = time.monotonic() + timeout_s
        try:
            number = self.send(message)
            while True:
                reply = self.receive(max(0.0, deadline - time.monotonic()))
                if reply is None:
                    raise errors.ConnectionLost(f"the node agent at {self.address} did not answer in {timeout_s:g} s.")
                if reply.reply_to != number:
                    others.append(reply)
                elif isinstance(reply, Refused):
                    raise_refusal(reply)
                else:
                    assert isinstance(reply, Done)
                    return reply
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
        return self._sock.fileno() < 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()
