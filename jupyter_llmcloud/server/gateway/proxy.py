"""One request on its way to a replica and back. Another replica is tried only before the first byte of the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from jupyter_llmcloud.core.serving.endpoint.response_id import REPLICA_HEADER
from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.core.serving.usage.stream_usage import BEHIND_THE_LAST_EVENT, STREAM_USAGE_HEADER, UsageCut
from jupyter_llmcloud.protocol.openai.usage import UNKNOWN, AnswerUsage, usage_in_body, usage_in_events
from jupyter_llmcloud.server.endpoints.replica_client import ReplicaLost
from jupyter_llmcloud.server.endpoints.replica_connection import BrokenAnswer, ReplicaUnreachable
from jupyter_llmcloud.server.gateway.admission import QUEUE_TIMEOUT_S, NotAdmitted
from jupyter_llmcloud.server.gateway.metrics import queue_wait_of
from jupyter_llmcloud.server.gateway.open_requests import AbortReason
from jupyter_llmcloud.storage.server_state import RequestRecord

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.endpoints.replica_client import ReplicaClient
    from jupyter_llmcloud.server.endpoints.replica_connection import (
        ReplicaAnswer,
        ReplicaConnection,
        ReplicaConnections,
        Take,
    )

MAX_TRIES = 5
MAX_LOST = 2  # replicas that may die while they answer one request: it may be what they die of
STREAM = "text/event-stream"
REVISION = "x-llmcloud-revision"
HEADER_LENGTH = "Inference-Header-Content-Length"  # of the Open Inference Protocol, whose tensors may be binary
_PASSED_ON = {
    name.lower(): name
    for name in ("Content-Type", "Retry-After", "retry-after-ms", HEADER_LENGTH, "X-LLMC-Without-Effect")
}
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_TO_REPLICA = {"Content-Type": "application/json", STREAM_USAGE_HEADER: BEHIND_THE_LAST_EVENT}
_DONE = b"data: [DONE]\n\n"
_LOST = (OSError, ReplicaLost)


class ResponseSink(Protocol):
    """Where an answer goes: what the proxy needs of whoever took the request."""

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The status and the headers are known; more follows."""

    def write_chunk(self, chunk: bytes) -> bool:
        """A piece of a stream; whether the client can take the next one now."""

    async def drained(self) -> None:
        """Wait until it can."""

    def end(self, last: bytes, content_type: str) -> None:
        """The last of it."""

    def error_body(self, error: ApiError) -> Any:
        """An error as its clients know it."""


@dataclass(eq=False)
class GatewayRequest:
    """What is asked.

    Attributes:
        actor: who asks.
        route: what the replica calls it.
        shape: what routing knows of it.
        patience_s: how long the client waits for an answer to begin.
        began: on the clock of `time.perf_counter`.
        headers: more that the replica is told.
        path: where the replica answers it; "": below /v1.
        counts_tokens: whether it costs tokens, which the replica knows if its answer does not tell.
    """

    request_id: str
    actor: str
    route: str
    body: bytes
    shape: RequestShape = RequestShape()  # noqa: RUF009 - a value
    patience_s: float = QUEUE_TIMEOUT_S
    began: float = field(default_factory=time.perf_counter)
    headers: Mapping[str, str] = field(default_factory=dict)
    path: str = ""
    counts_tokens: bool = True


@dataclass(eq=False, slots=True)
class _Entered:
    """A place that a request has at a replica.

    Attributes:
        at: since when, on the clock of `time.perf_counter`.
        connection: by which the replica was asked already.
    """

    at: float
    replica: ReplicaClient
    connection: ReplicaConnection | None = None


class NoResponse(Exception):
    """The replica went away before the first byte of its answer. `delivered`: it had the request by then."""

    def __init__(self, reason: str, delivered: bool) -> None:
        super().__init__(reason)
        self.delivered = delivered


class Proxy:
    """Copies one answer, and knows afterwards how it went.

    Attributes:
        answer_s: what the replica that answered took for that, without the wait for a place there.
    """

    def __init__(self, request: GatewayRequest, endpoint: EndpointController, sink: ResponseSink, log: Logger) -> None:
        self._request = request
        self._endpoint = endpoint
        self._sink = sink
        self._log = log
        self._replica: ReplicaClient | None = None
        self._entered: _Entered | None = None
        self._first_byte_s: float | None = None
        self._tokens = UNKNOWN
        self._stream: _StreamCopy | None = None  # once one is passed on
        self._status = 0
        self._outcome = "done"
        self.answer_s = 0.0

    def record(self) -> RequestRecord:
        """How it went, for the books."""
        request = self._request
        return RequestRecord(
            request_id=request.request_id, actor=request.actor, endpoint=self._endpoint.name, route=request.route,
            status=self._status or 500, replica=self._replica.id if self._replica else "", outcome=self._outcome,
            duration_s=time.perf_counter() - request.began, first_byte_s=self._first_byte_s,
            prompt_tokens=self._tokens.prompt_tokens, completion_tokens=self._tokens.completion_tokens, t=time.time(),
        )  # fmt: skip

    def unknown_usage(self) -> Awaitable[dict[str, int] | None] | None:
        """The tokens of an answer that did not tell them, from its replica: also of one that was cut."""
        refused = self._outcome == "done" and self._status >= 400
        if not self._request.counts_tokens or self._replica is None or refused:
            return None
        if self._tokens.is_known:
            return None
        return self._replica.usage(self._request.request_id)

    def ask_now(self) -> None:
        """Ask a replica in this very moment, if one has a place. `run`, or else `cut`, goes on from there.

        A task that is made for it begins in the next round of the loop, and the replica would wait for that.
        """
        try:
            admission = self._endpoint.admission
            replica = admission.enter_now(self._request.shape)
            if replica is None:
                return
            entered = self._entered = _Entered(time.perf_counter(), replica)
            connections = replica.connections
            entered.connection = connections.take_idle()
            if entered.connection is not None:
                self._post(replica, connections, entered.connection)
        except Exception:  # `run` meets it as well, and says so
            self._leave()

    def _leave(self) -> None:
        """Give up the place that was taken before the task began."""
        entered, self._entered = self._entered, None
        if entered is not None:
            if entered.connection is not None:
                entered.connection.close()
            entered.replica.breaker.abandoned()
            admission = self._endpoint.admission
            admission.leave(entered.replica, self._request.shape)

    async def run(self) -> None:
        """Answer, whatever it takes. Raises ApiError as long as the client has been told nothing."""
        try:
            await self._try_replicas()
        except NotAdmitted as error:
            code = "queue_full" if error.status == 429 else "model_not_ready"
            message = f"model {self._endpoint.name!r} cannot answer now: {error} {self._state()}".rstrip()
            self._refuse(ApiError(error.status, message, code=code, retry_after_s=error.retry_after_s))
        except _LOST as error:
            message = f"the replica was lost in the middle of its answer ({_words(error)}): ask again."
            self._refuse(ApiError(503, message, code="replica_lost"), "replica lost")
        except ApiError:
            raise
        except Exception as error:
            self._log.exception("request %s", self._request.request_id)
            message = f"the answer broke off ({type(error).__name__}): the log of the Jupyter server tells more."
            self._refuse(ApiError(500, message, code="internal"))

    def cut(self, cut: AbortReason) -> None:
        """It is ended from our side. Raises ApiError as long as the client has been told nothing."""
        self._leave()
        self._outcome = cut.outcome
        self._status = cut.status
        if cut.message:
            self._refuse(ApiError(cut.status, cut.message, code=cut.code, retry_after_s=cut.retry_after_s), cut.outcome)

    def _refuse(self, error: ApiError, outcome: str = "") -> None:
        """Tell the client: as the answer, or as the last event of a stream, which then has no [DONE]."""
        self._status = self._status or error.status
        self._outcome = outcome or error.code or "refused"
        if self._stream is None:
            raise error
        self._sink.end(b"data: " + msgspec.json.encode(self._sink.error_body(error)) + b"\n\n", STREAM)

    def _state(self) -> str:
        state, reason = self._endpoint.state, self._endpoint.reason
        return f"It is {state}: {reason}" if reason else f"It is {state}."

    async def _try_replicas(self) -> None:
        avoid: frozenset[str] = frozenset()
        num_lost = 0
        shape, admission = self._request.shape, self._endpoint.admission
        for _ in range(MAX_TRIES):
            entered, waited_s = self._entered, 0.0
            self._entered = None
            if entered is None:
                asked_at = time.perf_counter()
                replica = await admission.enter(avoid, self._patience_left(), shape)
                entered = _Entered(time.perf_counter(), replica)
                waited_s = entered.at - asked_at
            try:
                await self._ask_and_note(entered)
                return
            except NoResponse as error:
                self._endpoint.suspect(entered.replica)
                avoid |= {entered.replica.id}
                num_lost += error.delivered
                if num_lost >= MAX_LOST:
                    why = f"{num_lost} replicas were lost while they answered this request, the last one: {error}."
                    raise NotAdmitted(503, why, 2) from None
            finally:
                admission.leave(entered.replica, shape)
                queue_wait_of(self._endpoint.name).observe(waited_s)
        raise NotAdmitted(503, f"{MAX_TRIES} replicas could not be reached.", 2)

    def _patience_left(self) -> float:
        return max(0.0, self._request.patience_s - (time.perf_counter() - self._request.began))

    async def _ask_and_note(self, entered: _Entered) -> None:
        """Ask it, and note how it went: by that it is chosen again, or not."""
        replica = entered.replica
        try:
            await self._ask(replica, entered.connection)
        except asyncio.CancelledError:
            replica.breaker.abandoned()
            raise
        except Exception:
            self._endpoint.note_outcome(replica, failed=True)
            raise
        tokens, self.answer_s = self._tokens.completion_tokens or 0, time.perf_counter() - entered.at
        self._endpoint.note_outcome(replica, self._status >= 500, tokens, self.answer_s)

    async def _ask(self, replica: ReplicaClient, connection: ReplicaConnection | None) -> None:
        self._replica = replica
        connections = replica.connections
        try:
            with replica.use():
                if connection is None:
                    connection = await connections.take()
                    self._post(replica, connections, connection)
                answer = await connection.answer()
                if answer.status == 503 and len(self._endpoint.ready_replicas()) > 1:
                    raise NoResponse("it is not ready any more", delivered=False)
                await self._copy(answer)
        except _LOST as error:
            if self._first_byte_s is not None:
                raise
            raise NoResponse(_words(error), not isinstance(error, ReplicaUnreachable)) from None
        finally:
            if connection is not None:
                connections.give_back(connection)

    def _post(self, replica: ReplicaClient, connections: ReplicaConnections, connection: ReplicaConnection) -> None:
        self._replica = replica
        request = self._request
        headers = {**_TO_REPLICA, **request.headers, "X-Request-Id": request.request_id, REPLICA_HEADER: replica.id}
        path = request.path or f"/v1/{request.route}"
        connections.post(connection, path, request.body, headers, self._begun)

    def _begun(self, answer: ReplicaAnswer) -> Take | None:
        """Something of an answer has come: who takes it and the rest, in the moment in which it comes."""
        if answer.status != 200 or answer.content_type != STREAM:
            return None
        return self._begin_stream(answer).take

    def _begin_stream(self, answer: ReplicaAnswer) -> _StreamCopy:
        self._begin(answer, _STREAM_HEADERS)
        self._stream = _StreamCopy(self._sink)
        return self._stream

    def _begin(self, answer: ReplicaAnswer, more: Mapping[str, str]) -> None:
        self._first_byte_s = time.perf_counter() - self._request.began
        headers = {name: answer.headers[lower] for lower, name in _PASSED_ON.items() if lower in answer.headers}
        self._status = answer.status
        if (replica := self._replica) is not None:
            headers[REVISION] = str(replica.stored.revision)
        self._sink.begin(answer.status, {**headers, **more})

    async def _copy(self, answer: ReplicaAnswer) -> None:
        if self._stream is not None:
            await self._pass_on(self._stream, answer.takes_more, answer)
            return
        streams = answer.content_type == STREAM
        first = await (answer.readany() if streams else answer.read())
        if streams and not first:
            raise BrokenAnswer("it ended its answer before that had begun")
        if streams:
            copy = self._begin_stream(answer)
            await self._pass_on(copy, copy.take(first), answer)
        else:
            self._begin(answer, {})
            self._tokens = usage_in_body(first)
            self._sink.end(first, answer.headers.get("content-type", "application/json"))

    async def _pass_on(self, copy: _StreamCopy, takes_more: bool, answer: ReplicaAnswer) -> None:
        try:
            while not (takes_more and await answer.copy_to(copy.take)):
                await self._sink.drained()
                takes_more = True
            if not copy.take_rest():
                await self._sink.drained()
        finally:
            if (told := copy.usage()) is not None:
                self._tokens = AnswerUsage(*told)
        if not copy.is_complete:
            raise BrokenAnswer("it ended its answer before that was complete")
        if not self._tokens.is_known:
            self._tokens = usage_in_events(copy.last)
        self._sink.end(b"", STREAM)


class _StreamCopy:
    """Passes a stream on piece by piece, but for what its replica tells behind the last event.

    Attributes:
        last: the piece that was passed on last.
    """

    def __init__(self, sink: ResponseSink) -> None:
        self._sink = sink
        self._cut = UsageCut()
        self._tail = b""
        self.last = b""

    def take(self, chunk: bytes) -> bool:
        """A piece has come; whether the client can take the next one now."""
        passed = self._cut.feed(chunk)
        return self._pass(passed) if passed else True

    def take_rest(self) -> bool:
        """No more comes."""
        rest = self._cut.rest()
        return self._pass(rest) if rest else True

    def _pass(self, passed: bytes) -> bool:
        self.last = passed
        self._tail = passed[-len(_DONE) :] if len(passed) >= len(_DONE) else (self._tail + passed)[-len(_DONE) :]
        return self._sink.write_chunk(passed)

    def usage(self) -> tuple[int, int] | None:
        """What the replica has told."""
        return self._cut.usage()

    @property
    def is_complete(self) -> bool:
        """Whether it ended as streams do, by [DONE] or an error."""
        return self._tail == _DONE or b'"error"' in self.last


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
