"""A request that came with a key, answered without a handler of Jupyter's: of those that are answered, not refused."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from http.client import responses
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, format_timestamp
from tornado.iostream import StreamClosedError

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.server.gateway.keyed.exchange import Caller, Exchange
from jupyter_llmcloud.server.gateway.request_shape import named_body, shape_from

if TYPE_CHECKING:
    from tornado.http1connection import HTTP1Connection
    from tornado.httputil import HTTPServerRequest

    from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape
    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.gateway.keyed.exchange import Services
    from jupyter_llmcloud.storage.server_state import StoredKey

BODY_TIMEOUT_S = 30.0
SLOW_READER_S = 30.0
JSON = "application/json"


class Admittance(Protocol):
    """What a request needs of whoever has let it in.

    Attributes:
        services: of the gateway.
        head: the headers of every answer, as they are written.
    """

    services: Services
    head: bytes

    def endpoint_of(self, model: str, key: StoredKey) -> tuple[EndpointController, str] | None:
        """The endpoint that is asked for a model, and its adapter; None where that is refused."""

    async def refuse(self, request: HTTPServerRequest, route: str, body: bytes) -> None:
        """Have a handler answer, who says why."""

    def asked(self, key: StoredKey, address: str) -> None:
        """A request with a key has come this way, from this address."""

    def answered(self, request: HTTPServerRequest, key: StoredKey, status: int) -> None:
        """It is over, which is noted and logged as everywhere in this server."""


def header_lines(headers: Mapping[str, str]) -> bytes:
    """Headers as they are written. Raises ValueError for one that would not end where it does."""
    text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if text.count("\n") != len(headers) or text.count("\r") != len(headers):
        raise ValueError("a line break within a header of an answer")
    return text.encode("latin-1")


class KeyedRequest(HTTPMessageDelegate):
    """One request, from its headers on. It is the sink of its answer, which it writes as it stands on the wire.

    Args:
        admittance: who has let it in.
        request: as tornado has read it.
        route: below /v1.
        key: that it came with, which is valid.
    """

    def __init__(self, admittance: Admittance, request: HTTPServerRequest, route: str, key: StoredKey) -> None:
        self._admittance = admittance
        self._request = request
        self._connection = cast("HTTP1Connection", request.connection)
        self._route = route
        self._key = key
        self._body = bytearray()  # it may come byte by byte
        self._exchange = Exchange(admittance.services, f"req-{os.urandom(16).hex()}", time.perf_counter())
        self._late: asyncio.TimerHandle | None = None  # ends a connection whose body does not come
        self._task: asyncio.Task[None] | None = None
        self._common = b""  # headers that the answer has whatever it is
        self._head: bytes | None = b""  # of the answer; None: it is on its way
        self._status = 0

    # --- what tornado tells ---

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        """The body is to come."""
        self._late = asyncio.get_running_loop().call_later(BODY_TIMEOUT_S, self._connection.close)

    def data_received(self, chunk: bytes) -> None:
        """Some of it."""
        self._body += chunk

    def finish(self) -> None:
        """All of it is here."""
        self._wait_no_longer()
        self._connection.set_close_callback(self._hung_up)
        self._task = asyncio.ensure_future(self._answer())

    def on_connection_close(self) -> None:
        """The rest of it does not come."""
        self._wait_no_longer()

    def _wait_no_longer(self) -> None:
        if self._late is not None:
            self._late.cancel()

    def _hung_up(self) -> None:
        self._exchange.hung_up()

    # --- its answer ---

    async def _answer(self) -> None:
        body = bytes(self._body)
        self._body.clear()  # it is not held twice
        try:
            if (asked := self._let_in(body)) is not None:
                await self._pass_on(body, *asked)
            else:
                self._head = None  # whoever refuses writes one
                await self._admittance.refuse(self._request, self._route, body)
        except Exception as error:
            self._fail(error)

    def _let_in(self, body: bytes) -> tuple[EndpointController, RequestShape] | None:
        """Which endpoint is asked, for what; None where that is refused."""
        read = named_body(body)
        found = self._admittance.endpoint_of(read.model, self._key) if read is not None else None
        if read is None or found is None:
            return None
        endpoint, adapter = found
        shape = shape_from(read, f"key:{self._key.id}", adapter)
        try:
            self._exchange.reserve(self._key, shape)
        except ApiError:
            return None
        return endpoint, shape

    async def _pass_on(self, body: bytes, endpoint: EndpointController, shape: RequestShape) -> None:
        # In the next round of the loop, when the replica has been asked, and nobody waits for it.
        asyncio.get_running_loop().call_soon(self._prepare_head)
        caller = Caller(f"key:{self._key.id}", self._key, self._request.headers)
        try:
            await self._exchange.pass_on(caller, endpoint, self._route, body, shape, self)
        except Exception as error:
            self._fail(error)
        finally:
            self._admittance.answered(self._request, self._key, self._status or 200)

    def _prepare_head(self) -> None:
        """What the answer's head has in any case."""
        self._admittance.asked(self._key, self._request.remote_ip or "")
        self._exchange.note_activity()
        self._common = self._common or self._common_headers()

    def _common_headers(self) -> bytes:
        quota = self._exchange.quota_headers(self._key)
        own = {"Date": format_timestamp(time.time()), "X-Request-Id": self._exchange.request_id, **quota}
        self._connection.stream.set_nodelay(True)
        return self._admittance.head + header_lines(own)

    def _fail(self, error: Exception) -> None:
        """Answer with an error, if nothing is told yet."""
        if not isinstance(error, ApiError):
            self._exchange.log.error("request %s", self._exchange.request_id, exc_info=error)
            message = "the answer broke off: the log of the Jupyter server tells more."
            error = ApiError(500, message, code="internal")
        if self._head is None:  # there is no answer any more that could say so
            self._connection.close()
            return
        more = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        self.begin(error.status, {**error.headers(), **more})
        self.end(msgspec.json.encode(error.body()), JSON)

    # --- the sink of its proxy ---

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The status and the headers are known."""
        self._status = status
        start = f"HTTP/1.1 {status} {responses.get(status, 'Unknown')}\r\n".encode()
        self._common = self._common or self._common_headers()
        self._head = start + self._common + header_lines(headers)

    def write_chunk(self, chunk: bytes) -> bool:
        """Pass a piece on; whether the system has taken all of it."""
        connection = self._connection
        framed = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        if self._head is not None:
            framed, self._head = self._head + b"Transfer-Encoding: chunked\r\n\r\n" + framed, None
        connection.write(framed)
        self._exchange.piece()
        return not (connection.stream.writing() or connection.stream.closed())

    async def drained(self) -> None:
        """Wait until the client has taken what was written; one that takes too long has hung up."""
        try:
            async with asyncio.timeout(SLOW_READER_S):
                await self._connection.write(b"")
        except (TimeoutError, StreamClosedError):
            self._exchange.hung_up()
            self._connection.close()
            await asyncio.sleep(0)  # where the cut is felt

    def end(self, last: bytes, content_type: str) -> None:
        """The last of it."""
        if self._connection.stream.closed():
            return
        if self._head is not None:
            told = {"Content-Length": str(len(last))}
            if b"\r\nContent-Type: " not in self._head:
                told["Content-Type"] = content_type
            head, self._head = self._head + header_lines(told) + b"\r\n", None
            self._connection.write(head + last)
        else:
            self._connection.write((b"%x\r\n%b\r\n" % (len(last), last) if last else b"") + b"0\r\n\r\n")
        self._connection.finish()

    def error_body(self, error: ApiError) -> Any:
        """An error as its clients know it."""
        return error.body()
