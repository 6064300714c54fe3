"""One request to a model once it is known who asks: let in, answered by a replica, written down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from jupyter_llmcloud.server.answers.capturing_sink import CapturingSink
from jupyter_llmcloud.server.answers.copied_answers import CACHE, CopiedAnswers
from jupyter_llmcloud.server.gateway.admission import QUEUE_TIMEOUT_S
from jupyter_llmcloud.server.gateway.metrics import StreamTimes
from jupyter_llmcloud.server.gateway.open_requests import HUNG_UP, OpenRequest, RequestAborted
from jupyter_llmcloud.server.gateway.proxy import REVISION, GatewayRequest, Proxy
from jupyter_llmcloud.server.gateway.tracing import RequestTrace, trace_context
from jupyter_llmcloud.storage.server_state import RequestRecord

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape
    from jupyter_llmcloud.server.answers.keeper import Keeper
    from jupyter_llmcloud.server.answers.response_cache import CachedAnswer
    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.endpoints.shadow import ShadowCopy
    from jupyter_llmcloud.server.gateway.key_quotas import KeyQuotas
    from jupyter_llmcloud.server.gateway.open_requests import OpenRequests
    from jupyter_llmcloud.server.gateway.proxy import ResponseSink
    from jupyter_llmcloud.storage.server_state import StoredKey

ANSWER_MARGIN_S = 1.0
KEY_HEADER = "X-LLMC-Key"  # its id, for the replica
_PATIENCE_HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")  # in seconds, from OpenAI's own clients
_NOTE_EVERY_S = 1.0
_NONE: Mapping[str, str] = {}


class Services(NamedTuple):
    """What the gateway's requests share.

    Attributes:
        requests: those that are being answered.
        quotas: what keys have used of late.
        keeper: of requests to endpoints that were started to keep them.
        settings: of the Jupyter server.
        log: of the Jupyter server.
    """

    requests: OpenRequests
    quotas: KeyQuotas
    keeper: Keeper
    settings: dict[str, Any]
    log: Logger


class Caller(NamedTuple):
    """Who asks.

    Attributes:
        actor: as usage names them.
        key: that the request came with.
        headers: of the request.
        patience_s: how long they are known to wait for an answer to begin.
        trace: what they told of a trace that the request is part of.
    """

    actor: str
    key: StoredKey | None
    headers: Mapping[str, str]
    patience_s: float
    trace: Mapping[str, str]

    @classmethod
    def of(cls, actor: str, key: StoredKey | None, headers: Mapping[str, str]) -> Caller:
        """Who asks with these headers."""
        return cls(actor, key, headers, _patience_s(headers), trace_context(headers))


@dataclass(eq=False)
class Delivery:
    """A request on its way to a replica.

    Attributes:
        trace: ended when it is over.
        copies: what becomes of its answer beside.
        may_shadow: whether a revision that is tried gets a copy of it.
        proxy: once it is begun.
        shadow: that has got a copy.
        answered: the answer that is compared with the shadow's.
    """

    endpoint: EndpointController
    request: GatewayRequest
    trace: RequestTrace
    copies: CopiedAnswers
    sink: ResponseSink
    may_shadow: bool
    proxy: Proxy | None = None
    shadow: ShadowCopy | None = None
    answered: CapturingSink | None = None


@dataclass(eq=False)
class Exchange:
    """One request and its answer.

    Attributes:
        request_id: by which it is known everywhere.
        began: on the clock of `time.perf_counter`.
        open: by which it is cut.
        times: when the pieces of its answer came, once a replica is asked.
    """

    services: Services
    request_id: str
    began: float
    open: OpenRequest = field(default_factory=OpenRequest)
    times: StreamTimes | None = None
    _noted: float = 0.0

    def reserve(self, key: StoredKey | None, shape: RequestShape) -> None:
        """Let the request in by the quota of its key; raises ApiError (429)."""
        if key is not None:
            self.open.key_id = key.id
            if key.limits.any:
                quotas = self.services.quotas
                self.open.reservation = quotas.reserve(key, shape.num_tokens)

    def quota_headers(self, key: StoredKey) -> dict[str, str]:
        """How much the key has left."""
        quotas = self.services.quotas
        return quotas.headers(key)

    @property
    def log(self) -> Logger:
        """Of the server."""
        return self.services.log

    def hung_up(self) -> None:
        """The client has gone: nobody needs the rest of the answer."""
        self.open.cut(HUNG_UP)

    def refused(self, record: RequestRecord) -> None:
        """It was refused before a replica was asked, which is written down as well."""
        requests = self.services.requests
        requests.write_down(record)

    async def pass_on(
        self,
        caller: Caller,
        endpoint: EndpointController,
        route: str,
        body: bytes,
        shape: RequestShape,
        sink: ResponseSink,
        *,
        path: str = "",
        headers: Mapping[str, str] = _NONE,
    ) -> None:
        """Have a replica answer, and write down how it went. Raises ApiError while the client has been told nothing.

        Args:
            shape: what routing knows of the request.
            sink: where the answer goes.
            path: where the replica answers, when that is not below /v1; such requests cost no tokens.
            headers: of the request, that the replica needs.
        """
        await self.finish(self.start(caller, endpoint, route, body, shape, sink, path=path, headers=headers))

    def start(
        self, caller: Caller, endpoint: EndpointController, route: str, body: bytes, shape: RequestShape,
        sink: ResponseSink, *, path: str = "", headers: Mapping[str, str] = _NONE,
    ) -> Delivery:  # fmt: skip
        """As `pass_on`, but only what can be done in this very moment; `finish` does the rest."""
        services = self.services
        try:
            trace = RequestTrace(caller.trace, route, endpoint.name, self.request_id)
            told = {**trace.headers, **({KEY_HEADER: caller.key.id} if caller.key else {}), **headers}
            request = GatewayRequest(
                self.request_id, caller.actor, route, body, shape, caller.patience_s, self.began, told, path, not path
            )
            copies = CopiedAnswers(services.settings.get(CACHE), services.keeper, endpoint)
            delivery = Delivery(endpoint, request, trace, copies, sink, may_shadow=not headers)
            if path or not copies.may_be_known:
                self._begin(delivery)
            self.times = StreamTimes(endpoint.name, self.began)
        except BaseException:
            self.open.give_back_unused()
            raise
        return delivery

    def _begin(self, delivery: Delivery) -> Proxy:
        request, endpoint, sink = delivery.request, delivery.endpoint, delivery.sink
        if not request.path:
            sink = delivery.copies.sink(request, sink)
        if delivery.may_shadow:
            delivery.shadow = endpoint.copy_to_shadow(request.path or f"/v1/{request.route}", request.body)
        if delivery.shadow is not None:
            sink = delivery.answered = CapturingSink(sink)
        delivery.proxy = Proxy(request, endpoint, sink, self.services.log)
        requests = self.services.requests
        if self.open.cut_by is None and not requests.is_closing:
            delivery.proxy.ask_now()  # before anything else: the replica works while it is counted
        requests.begin(self.open)
        endpoint.scaling.arrived(asyncio.get_running_loop().time())
        return delivery.proxy

    async def finish(self, delivery: Delivery) -> None:
        """Go on with what is started. Raises as `pass_on`."""
        try:
            await self._finish(delivery)
        finally:
            self.open.give_back_unused()

    async def _finish(self, delivery: Delivery) -> None:
        request, copies = delivery.request, delivery.copies
        if delivery.proxy is None and (found := await copies.find(request)) is not None:
            copies.keep_again(request, found)
            delivery.trace.end(self._answer_again(request, delivery.endpoint, found, delivery.sink))
            return
        proxy = delivery.proxy or self._begin(delivery)
        try:
            await self._answer(proxy)
        finally:
            self.note_activity()
            copies.keep(request)
            record = proxy.record()
            if delivery.shadow is not None and delivery.answered is not None and record.outcome == "done":
                failed, answered = record.status >= 500, delivery.answered
                delivery.shadow.answered(proxy.answer_s, failed, answered.content_type, answered.answer())
            delivery.trace.end(record)
            requests = self.services.requests
            requests.end(self.open, record, proxy.unknown_usage(), delivery.endpoint.rates)

    def _answer_again(
        self, request: GatewayRequest, endpoint: EndpointController, found: CachedAnswer, sink: ResponseSink
    ) -> RequestRecord:
        """Give the answer that the same request got before; returns how it went."""
        revision = str(endpoint.stored.current.number)
        sink.begin(200, {"Content-Type": found.content_type, "X-LLMCloud-Cache": "hit", REVISION: revision})
        sink.end(found.body, found.content_type)
        record = RequestRecord(
            request_id=request.request_id, actor=request.actor, endpoint=endpoint.name, route=request.route, status=200,
            outcome="cached", duration_s=time.perf_counter() - request.began, prompt_tokens=0, completion_tokens=0,
            t=time.time(),
        )  # fmt: skip
        requests = self.services.requests
        requests.begin(self.open)
        requests.end(self.open, record, None, endpoint.rates)
        return record

    async def _answer(self, proxy: Proxy) -> None:
        try:
            with self.open.cuttable():
                await proxy.run()
        except RequestAborted as error:
            proxy.cut(error.cut)

    def piece(self) -> None:
        """A piece of the answer is passed on."""
        if self.times is not None:
            self.times.piece()
        if time.monotonic() - self._noted > _NOTE_EVERY_S:
            self.note_activity()

    def note_activity(self) -> None:
        """Somebody uses this server: the idle culler shall not end it."""
        from jupyter_server._tz import utcnow

        self.services.settings["last_activity_times"]["llmcloud"] = utcnow()
        self._noted = time.monotonic()


def _patience_s(headers: Mapping[str, str]) -> float:
    """How long this client is known to wait, less what the way to it takes."""
    told = [headers[name] for name in _PATIENCE_HEADERS if name in headers]
    if not told:
        return QUEUE_TIMEOUT_S
    known = [float(text) - ANSWER_MARGIN_S for text in told if text.isascii() and text.replace(".", "", 1).isdigit()]
    return max(0.0, min([*known, QUEUE_TIMEOUT_S]))
