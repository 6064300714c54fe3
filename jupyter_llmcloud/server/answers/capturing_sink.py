"""A copy of an answer that is passed on: for what is kept of it, or given again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jupyter_llmcloud.core.serving.openai_errors import ApiError
    from jupyter_llmcloud.server.gateway.proxy import ResponseSink

MAX_BYTES = 1 << 20  # of an answer; a longer one is not copied
STREAM = "text/event-stream"


class CapturingSink:
    """A sink before another one.

    Attributes:
        content_type: of the answer, once it is over.
    """

    def __init__(self, sink: ResponseSink) -> None:
        self._sink = sink
        self._status = 0
        self._answer = bytearray()
        self.content_type = ""

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The status and the headers are known."""
        self._status = status
        self._sink.begin(status, headers)

    def write_chunk(self, chunk: bytes) -> bool:
        """A piece of a stream."""
        self._copy(chunk)
        return self._sink.write_chunk(chunk)

    async def drained(self) -> None:
        """Wait until the next one can be taken."""
        await self._sink.drained()

    def end(self, last: bytes, content_type: str) -> None:
        """The last of it."""
        self._copy(last)
        self.content_type = content_type
        self._sink.end(last, content_type)

    def error_body(self, error: ApiError) -> Any:
        """An error as its clients know it."""
        return self._sink.error_body(error)

    def _copy(self, chunk: bytes) -> None:
        if len(self._answer) <= MAX_BYTES:
            self._answer += chunk

    def answer(self) -> bytes | None:
        """The whole answer; None of one that failed, was cut or is too long."""
        complete = bool(self.content_type) and (
            self.content_type != STREAM or self._answer.endswith(b"data: [DONE]\n\n")
        )
        if self._status != 200 or not complete or not 0 < len(self._answer) <= MAX_BYTES:
            return None
        return bytes(self._answer)
