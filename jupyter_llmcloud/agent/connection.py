"""The agent's end of a connection: messages in, messages out, a slow reader never blocks the agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from jupyter_llmcloud.core.frames import Decoder, Message, encode

MAX_BUFFERED = 256 << 20  # bytes waiting for a reader that does not read; beyond it is cut off and can attach again


class Connection:
    """Messages over an asyncio stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.closed = False
        self._pending: list[bytes] = []

    def send(self, message: Message) -> None:
        """Queue a message; what is queued in one turn of the loop leaves in one piece, and wakes the reader once."""
        if self.closed:
            return
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pending.append(encode(message))

    def _flush(self) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        if self.closed:
            return
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > MAX_BUFFERED:
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
