"""One request on its way to a replica and back. Another replica is tried only before the first byte of the answer."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.server.gateway.admission import NotAdmitted
from jupyter_llmcloud.storage.server_state import RequestRecord

if TYPE_CHECKING:
    from jupyter_llmcloud.server.endpoints.controller import LiveEndpoint
    from jupyter_llmcloud.server.endpoints.replica_client import ReplicaClient
    from jupyter_llmcloud.server.gateway.handlers import InferenceHandler

SLOW_READER_S = 30.0
MAX_TRIES = 3
_PASSED_ON = ("Content-Type", "Retry-After", "retry-after-ms")
_TO_REPLICA = {"Content-Type": "application/json"}


class Lost(Exception):
    """The replica went away before the first byte of its answer."""


class _Tokens(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _WithUsage(msgspec.Struct):
    usage: _Tokens | None = None


class Forwarding:
    """Copies one answer, and knows afterwards how it went."""

    def __init__(self, handler: InferenceHandler, endpoint: LiveEndpoint, body: bytes) -> None:
        self._handler = handler
        self._endpoint = endpoint
        self._body = body
        self._replica = ""
        self._first_byte_s: float | None = None
        self._tokens = _Tokens()
        self._streams = False
        self._status = 0
        self._outcome = "done"

    def usage(self) -> RequestRecord:
        """How it went, for the books."""
        handler = self._handler
        return RequestRecord(
            request_id=handler.request_id, actor=handler.actor, endpoint=self._endpoint.name, route=handler.route,
            status=self._status or handler.get_status(), replica=self._replica, outcome=self._outcome,
            duration_s=time.perf_counter() - handler.started_at, first_byte_s=self._first_byte_s,
            prompt_tokens=self._tokens.prompt_tokens, completion_tokens=self._tokens.completion_tokens, t=time.time(),
        )  # fmt: skip

    def note_cut(self, reason: str) -> None:
        """It was cut from our side."""
        self._outcome = reason
        self._status = 499 if reason == "hung up" else 401

    async def run(self) -> None:
        """Answer, whatever it takes."""
        try:
            await self._try_replicas()
        except NotAdmitted as error:
            code = "queue_full" if error.status == 429 else "model_not_ready"
            message = f"model {self._endpoint.name!r} cannot answer now: {error} {self._state()}".rstrip()
            self.tell(ApiError(error.status, message, code=code, retry_after_s=error.retry_after_s))

    def _state(self) -> str:
        stored = self._endpoint.stored
        return f"It is {stored.state}: {stored.reason}" if stored.reason else f"It is {stored.state}."

    async def _try_replicas(self) -> None:
        avoid: frozenset[str] = frozenset()
        for _ in range(MAX_TRIES):
            replica = await self._endpoint.admission.enter(avoid)
            try:
                await self._ask(replica)
                return
            except Lost:
                self._endpoint.suspect(replica)
                avoid |= {replica.id}
            finally:
                self._endpoint.admission.leave(replica)
        raise NotAdmitted(503, f"{MAX_TRIES} replicas were lost before they answered.", 2)

    async def _ask(self, replica: ReplicaClient) -> None:
        self._replica = replica.id
        headers = {**_TO_REPLICA, "X-Request-Id": self._handler.request_id}
        path = f"/v1/{self._handler.route}"
        try:
            response = await replica.session.post(path, data=self._body, headers=headers)
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(str(error)) from None
        try:
            if response.status == 503 and len(self._endpoint.ready_replicas()) > 1:
                raise Lost("it is not ready any more")
            await self._copy(response)
        finally:
            response.close() if not response.content.at_eof() else response.release()

    async def _copy(self, response: aiohttp.ClientResponse) -> None:
        streams = response.content_type == "text/event-stream"
        try:
            first = await (response.content.readany() if streams else response.read())
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(str(error)) from None
        handler = self._handler
        self._first_byte_s = time.perf_counter() - handler.started_at
        handler.set_status(response.status)
        for name in _PASSED_ON:
            if name in response.headers:
                handler.set_header(name, response.headers[name])
        if streams:
            await self._stream(first, response)
        else:
            self._note_tokens(first)
            handler.finish(first, set_content_type=response.headers.get("Content-Type", "application/json"))

    def _note_tokens(self, body: bytes) -> None:
        try:
            self._tokens = msgspec.json.decode(body, type=_WithUsage).usage or self._tokens
        except (msgspec.DecodeError, UnicodeDecodeError):
            return

    async def _stream(self, chunk: bytes, response: aiohttp.ClientResponse) -> None:
        handler = self._handler
        self._streams = True
        handler.set_header("Cache-Control", "no-cache")
        handler.set_header("X-Accel-Buffering", "no")
        connection: Any = handler.request.connection
        connection.stream.set_nodelay(True)
        last = b""
        try:
            while chunk:
                await self._pass_on(chunk)
                last = chunk
                chunk = await response.content.readany()
        except (aiohttp.ClientError, OSError):
            self._outcome = "replica lost"
            message = "the replica was lost in the middle of its answer: ask again."
            self.tell(ApiError(503, message, code="replica_lost"))
            return
        self._note_stream_tokens(last)
        handler.finish(set_content_type="text/event-stream")

    async def _pass_on(self, chunk: bytes) -> None:
        handler = self._handler
        handler.write(chunk)
        flushed = handler.flush()
        handler.note_streaming()
        if flushed.done():
            return
        try:
            await asyncio.wait_for(flushed, SLOW_READER_S)  # the next chunk is read when the client has taken this one
        except TimeoutError:
            handler.cut_because = "hung up"
            handler.request.connection.stream.close()  # type: ignore[union-attr]
            raise asyncio.CancelledError from None

    def _note_stream_tokens(self, last: bytes) -> None:
        for event in reversed(last.split(b"\n\n")):
            if b'"usage"' in event:
                self._note_tokens(event.removeprefix(b"data:").strip())
                return

    def tell(self, error: ApiError) -> None:
        """Tell the client: as the answer, or as the last event of a stream, which then has no [DONE]."""
        handler = self._handler
        self._status = self._status or (error.status if not self._streams else 200)
        if self._outcome == "done":
            self._outcome = error.code or "refused"
        if not self._streams:
            raise error
        handler.write(f"data: {json.dumps(error.body())}\n\n")
        handler.finish(set_content_type="text/event-stream")
