"""The agent's end of a connection: messages in, messages out, a slow reader never blocks the agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from jupyter_llmcloud.protocol.frames import Decoder, Message, encode

AGENT_SOCKET = "agent.sock"
MAX_BUFFERED = 256 << 20  # bytes waiting for a reader that does not read; beyond it is cut off and can attach again
UNHURRIED_S = 0.02


class Connection:
    """Messages over an asyncio stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.closed = False
        self._pending: list[bytes] = []
        self._leaving: asyncio.Handle | None = None
        self._hurries = False
        self._asked_for = 0  # bytes of payloads, which the reader has asked for: their size is no sign of its slowness

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

    def _flush(self) -> None:
        self._leaving, self._hurries = None, False
        data = b"".join(self._pending)
        self._pending.clear()
        if self.closed or not data:
            return
        self._writer.write(data)
        waiting = self._writer.transport.get_write_buffer_size()
        if not waiting:
            self._asked_for = 0
        elif waiting > MAX_BUFFERED + self._asked_for:
            self.close()

    async def messages(self) -> AsyncIterator[Message]:
        """What the other end says, until it closes."""
        decoder = Decoder()
        try:
            while data := await self._reader.read(1 << 20):
                for message in decoder.feed(data):
                    yield message
        except ConnectionError:
            return

    def close(self) -> None:
        """Close this end; what was queued is sent."""
        if not self.closed:
            if self._pending:
                self._writer.write(b"".join(self._pending))
                self._pending.clear()
            self.closed = True
            self._writer.close()
