"""The answer to a request that came with a key, written as it stands on the wire; what is refused is not its matter."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Mapping
from functools import lru_cache
from http.client import responses
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
from tornado.httputil import format_timestamp

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.server.gateway.keyed.exchange import Caller, Exchange
from jupyter_llmcloud.server.gateway.request_shape import named_body, shape_from

if TYPE_CHECKING:
    from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape
    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.gateway.keyed.exchange import Delivery, Services
    from jupyter_llmcloud.server.gateway.keyed.known_keys import KnownKey
    from jupyter_llmcloud.storage.server_state import StoredKey

BODY_TIMEOUT_S = 30.0
SLOW_READER_S = 30.0
JSON = "application/json"


class Asked(NamedTuple):
    """A plain request, as its head tells.

    Attributes:
        uri: as it stands there.
        route: below /v1.
        known: the key that it came with, which is valid.
        address: where it comes from.
        caller: whose headers' `get` takes names in lower case.
    """

    uri: str
    route: str
    known: KnownKey
    address: str
    caller: Caller

    def without(self, header: str) -> Asked:
        """The same, but for a header that is not kept."""
        headers = {name: value for name, value in self.caller.headers.items() if name != header}
        return self._replace(caller=self.caller._replace(headers=headers))


class Admitted(NamedTuple):
    """A plain request that may be answered, and the length of its body."""

    asked: Asked
    length: int


class Admittance(Protocol):
    """What an answer needs of whoever has let its request in.

    Attributes:
        services: of the gateway.
        head: the headers of every answer, as they are written.
    """

    services: Services
    head: bytes

    def endpoint_of(self, model: str, key: StoredKey) -> tuple[EndpointController, str] | None:
        """The endpoint that is asked for a model, and its adapter; None where that is refused."""

    def asked(self, key: StoredKey, address: str) -> None:
        """A request with a key has come this way, from this address."""

    def answered(self, asked: Asked, status: int, seconds: float) -> None:
        """It is over, which is noted and logged as everywhere in this server."""


class AnswerWire(Protocol):
    """Where an answer is written."""

    def begin(self) -> None:
        """The first of it comes."""

    def write(self, data: bytes) -> bool:
        """More of it; whether the system has taken all of it."""

    async def drained(self) -> None:
        """Wait until it has. Raises OSError when the client has gone."""

    def is_closed(self) -> bool:
        """Whether nobody is there any more."""

    def finish(self) -> None:
        """That was all of it."""

    def close(self) -> None:
        """End the connection."""


def header_lines(headers: Mapping[str, str]) -> bytes:
    """Headers as they are written. Raises ValueError for one that would not end where it does."""
    text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if text.count("\n") != len(headers) or text.count("\r") != len(headers):
        raise ValueError("a line break within a header of an answer")
    return text.encode("latin-1")


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return format_timestamp(second)


@lru_cache(maxsize=100)
def _status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {responses.get(status, 'Unknown')}\r\n".encode()


@lru_cache(maxsize=100)
def _known_lines(headers: tuple[tuple[str, str], ...]) -> bytes:
    """As `header_lines`: most answers of a replica have the same ones, and a client waits for them."""
    return header_lines(dict(headers))


class KeyedAnswer:
    """One answer: the sink of its proxy.

    Args:
        admittance: who has let the request in.
        asked: the request.
        wire: where the answer is written.
    """

    def __init__(self, admittance: Admittance, asked: Asked, wire: AnswerWire) -> None:
        self._admittance = admittance
        self._asked = asked
        self._wire = wire
        self._exchange = Exchange(admittance.services, f"req-{os.urandom(16).hex()}", time.perf_counter())
        self._common = b""  # headers that the answer has whatever it is
        self._head: bytes | None = b""  # of the answer; None: it is on its way
        self._status = 0

    def hung_up(self) -> None:
        """The client has gone."""
        self._exchange.hung_up()

    def let_in(self, body: bytes) -> tuple[EndpointController, RequestShape] | None:
        """Which endpoint is asked, for what; None where that is refused."""
        read = named_body(body)
        asked = self._asked
        key = asked.known.key
        found = self._admittance.endpoint_of(read.model, key) if read is not None else None
        if read is None or found is None:
            return None
        endpoint, adapter = found
        shape = shape_from(read, asked.caller.actor, adapter)
        try:
            self._exchange.reserve(key, shape)
        except ApiError:
            return None
        return endpoint, shape

    def give(self, body: bytes, endpoint: EndpointController, shape: RequestShape) -> Coroutine[Any, Any, None]:
        """Have a replica answer: it is asked in this very moment, if it can be. What is returned sees to the rest."""
        started: Delivery | Exception
        try:
            started = self._exchange.start(self._asked.caller, endpoint, self._asked.route, body, shape, self)
        except Exception as error:
            started = error
        # In the next round of the loop, when the replica has been asked, and nobody waits for it.
        asyncio.get_running_loop().call_soon(self._prepare_head)
        return self._see_to(started)

    async def _see_to(self, started: Delivery | Exception) -> None:
        try:
            if isinstance(started, Exception):
                raise started
            await self._exchange.finish(started)
        except Exception as error:
            self.fail(error)
        finally:
            seconds = time.perf_counter() - self._exchange.began
            self._admittance.answered(self._asked, self._status or 200, seconds)

    def _prepare_head(self) -> None:
        """What the answer's head has in any case."""
        asked = self._asked
        self._admittance.asked(asked.known.key, asked.address)
        self._exchange.note_activity()
        self._common = self._common or self._common_headers()

    def _common_headers(self) -> bytes:
        asked = self._asked
        quota = self._exchange.quota_headers(asked.known.key)
        own = {"Date": _date(int(time.time())), "X-Request-Id": self._exchange.request_id, **quota}
        self._wire.begin()
        return self._admittance.head + header_lines(own)

    def leave_head(self) -> None:
        """Somebody else writes it."""
        self._head = None

    def fail(self, error: Exception) -> None:
        """Answer with an error, if nothing is told yet."""
        if not isinstance(error, ApiError):
            self._exchange.log.error("request %s", self._exchange.request_id, exc_info=error)
            message = "the answer broke off: the log of the Jupyter server tells more."
            error = ApiError(500, message, code="internal")
        if self._head is None:  # there is no answer any more that could say so
            self._wire.close()
            return
        more = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        self.begin(error.status, {**error.headers(), **more})
        self.end(msgspec.json.encode(error.body()), JSON)

    # --- the sink of its proxy ---

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The status and the headers are known."""
        self._status = status
        self._common = self._common or self._common_headers()
        self._head = _status_line(status) + self._common + _known_lines(tuple(headers.items()))

    def write_chunk(self, chunk: bytes) -> bool:
        """Pass a piece on; whether the system has taken all of it."""
        framed = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        if self._head is not None:
            framed, self._head = self._head + b"Transfer-Encoding: chunked\r\n\r\n" + framed, None
        is_taken = self._wire.write(framed)
        self._exchange.piece()
        return is_taken

    async def drained(self) -> None:
        """Wait until the client has taken what was written; one that takes too long has hung up."""
        try:
            async with asyncio.timeout(SLOW_READER_S):
                await self._wire.drained()
        except OSError:  # TimeoutError is one
            self._exchange.hung_up()
            self._wire.close()
            await asyncio.sleep(0)  # where the cut is felt

    def end(self, last: bytes, content_type: str) -> None:
        """The last of it."""
        if self._wire.is_closed():
            return
        if self._head is not None:
            told = {"Content-Length": str(len(last))}
            if b"\r\nContent-Type: " not in self._head:
                told["Content-Type"] = content_type
            head, self._head = self._head + header_lines(told) + b"\r\n", None
            self._wire.write(head + last)
        else:
            self._wire.write((b"%x\r\n%b\r\n" % (len(last), last) if last else b"") + b"0\r\n\r\n")
        self._wire.finish()

    def error_body(self, error: ApiError) -> Any:
        """An error as its clients know it."""
        return error.body()
