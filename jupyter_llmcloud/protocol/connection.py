"""Messages over an asyncio stream: requests find their replies, and a slow reader never blocks its writer."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator

from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError
from jupyter_llmcloud.protocol.frames import Decoder, Message, Unreadable, encode
from jupyter_llmcloud.protocol.rpc import Calls, R, Reply, Request

AGENT_SOCKET = "agent.sock"
_BRIDGE = re.compile(r"b[0-9a-f]{12}\.sock")
NEXT_AGENT = "LLMCLOUD_NEXT_AGENT"  # SECONDS:PATH, told to a zygote: see there
MAX_BUFFERED = 256 << 20  # bytes waiting for a reader that does not read; beyond it is cut off and can attach again
UNHURRIED_S = 0.02
MAX_READ = 1 << 20


def bridge_name(target: str) -> str:
    """The file name of a socket here that stands for `target`, a socket on another host."""
    return f"b{hashlib.sha256(target.encode()).hexdigest()[:12]}.sock"


def is_bridge(address: str) -> bool:
    """Whether a socket stands for one of another host. It ends with the process that holds it, and no agent with it."""
    return _BRIDGE.fullmatch(os.path.basename(address)) is not None


class Connection:
    """One end of a connection.

    Args:
        peer: the process at the other end, for errors: such as "the node agent at PATH".
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> None:
        self.closed = False
        self._peer = peer
        self._calls = Calls(peer)
        self._reader = reader
        self._writer = writer
        self._pending: list[bytes] = []
        self._leaving: asyncio.Handle | None = None
        self._hurries = False
        self._asked_for = 0  # bytes of payloads, which the reader has asked for: their size is no sign of its slowness

    async def request(self, request: Request[R], timeout_s: float | None = 30.0) -> R:
        """Send a request and wait for its reply, which `messages` must be read for; a refusal is raised."""
        return await self._calls.ask(request, self.send, timeout_s)

    def send(self, message: Message, *, hurry: bool = True) -> None:
        """Queue a message; what is queued in one turn of the loop leaves in one piece, and wakes the reader once.

        Without `hurry` it may leave a moment later, with one that does.
        """
        if self.closed:
            return
        self._pending.append(encode(message))
        self._asked_for += len(message.payload)
        loop = asyncio.get_running_loop()
        if hurry and not self._hurries:
            self._hurries = True
            if self._leaving is not None:
                self._leaving.cancel()
            self._leaving = loop.call_soon(self._flush)
        elif self._leaving is None:
            self._leaving = loop.call_later(UNHURRIED_S, self._flush)

    def flush(self) -> None:
        """Send what is queued now, and not when this turn of the loop is over: somebody waits for it."""
        if self._leaving is not None:
            self._leaving.cancel()
        self._flush()

    def _flush(self) -> None:
        self._leaving, self._hurries = None, False
        if self.closed or not self._pending:
            return
        self._write()
        waiting = self._writer.transport.get_write_buffer_size()
        if not waiting:
            self._asked_for = 0
        elif waiting > MAX_BUFFERED + self._asked_for:
            self.close()

    def _write(self) -> None:
        pending, self._pending = self._pending, []
        self._writer.write(pending[0] if len(pending) == 1 else b"".join(pending))

    async def messages(self) -> AsyncIterator[Message]:
        """What the other end says, but for replies to requests of this end, until it closes.

        Raises ProtocolError for what is no message of this version, and what the other end refuses the connection with.
        """
        decoder = Decoder(self._peer)
        lost: LLMCloudError = ConnectionLost(f"{self._peer} has gone.")
        try:
            while data := await self._reader.read(MAX_READ):
                for message in decoder.feed(data):
                    if isinstance(message, Reply) or (isinstance(message, Unreadable) and message.reply_to):
                        self._calls.take(message)
                    else:
                        yield message
        except ConnectionError:
            return
        except LLMCloudError as error:
            lost = error
            raise
        finally:
            self._calls.fail(lost)

    def close(self) -> None:
        """Close this end; what was queued is sent."""
        if not self.closed:
            if self._pending:
                self._write()
            self.closed = True
            self._writer.close()
