"""Rows of batches on their way to the replicas: routed, counted and written down as every request is."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from jupyter_llmcloud.core.serving.batch_rows import BatchRow
from jupyter_llmcloud.core.serving.keys import may_infer
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.server.answers.copied_answers import CopiedAnswers
from jupyter_llmcloud.server.gateway.open_requests import HUNG_UP, OpenRequest, RequestAborted
from jupyter_llmcloud.server.gateway.proxy import GatewayRequest, Proxy
from jupyter_llmcloud.server.gateway.request_shape import shape_of
from jupyter_llmcloud.storage.server_state import RowRecord

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape
    from jupyter_llmcloud.server.answers.keeper import Keeper
    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry
    from jupyter_llmcloud.server.gateway.key_quotas import KeyQuotas, KeyReservation
    from jupyter_llmcloud.server.gateway.open_requests import OpenRequests
    from jupyter_llmcloud.storage.server_state import ServerState

ROW_PATIENCE_S = 30.0


@dataclass(frozen=True)
class RowAnswer:
    """What came of a row.

    Attributes:
        code: of an error.
        retry_after_s: what a refusal says of that.
    """

    request_id: str
    status: int
    body: bytes
    code: str | None = None
    retry_after_s: float | None = None

    @property
    def may_pass(self) -> bool:
        """Whether the same request may be answered later."""
        return self.status in (429, 503)

    @property
    def lost_a_replica(self) -> bool:
        """Whether a replica died while it answered: it may be what it died of."""
        return self.code == "replica_lost"


class _Collected:
    """A sink that keeps an answer."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.retry_after_s: float | None = None

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        told = headers.get("Retry-After", "")
        self.retry_after_s = float(told) if told.isascii() and told.isdigit() else None

    def write_chunk(self, chunk: bytes) -> bool:
        self.body += chunk
        return True

    async def drained(self) -> None:
        """It takes everything at once."""

    def end(self, last: bytes, content_type: str) -> None:
        self.body += last

    def error_body(self, error: ApiError) -> Any:
        return error.body()


class RowAsker:
    """Asks the endpoints of one server."""

    def __init__(
        self,
        endpoints: EndpointRegistry,
        requests: OpenRequests,
        quotas: KeyQuotas,
        keeper: Keeper,
        state: ServerState,
        log: Logger,
    ) -> None:
        self._quotas = quotas
        self._keeper = keeper
        self._endpoints = endpoints
        self._requests = requests
        self._state = state
        self._log = log

    def endpoint_of(self, model: str) -> str:
        """The endpoint that is asked for a model: for an adapter, too, also for one that is not there."""
        return self._endpoints.endpoint_of(model).partition(":")[0]

    def has(self, models: list[str]) -> bool:
        """Whether this server has all these endpoints, or models."""
        return all(self._find(model) is not None for model in models)

    def may_ask(self, key_id: str | None, endpoint: str) -> bool:
        """Whether the key of a batch is valid still and opens this endpoint; a Jupyter user may ask them all."""
        if key_id is None:
            return True
        key = self._state.key(key_id)
        return key is not None and key.is_valid(time.time()) and may_infer(key.scopes, endpoint)

    def places(self, models: list[str]) -> tuple[int, int]:
        """(places of the ready replicas, requests that wait for one) over these endpoints."""
        found = [endpoint for model in models if (endpoint := self._find(model)) is not None]
        places = sum(replica.load.capacity for endpoint in found for replica in endpoint.ready_replicas())
        return places, sum(endpoint.admission.num_waiting for endpoint in found)

    async def ask(self, row: BatchRow, route: str, owner: str, key_id: str | None) -> RowAnswer:
        """Answer a row. A refusal is an answer, too."""
        request_id = f"req-{uuid.uuid4().hex}"
        endpoint = self._find(row.model)
        if endpoint is None or endpoint.state == "failed":
            why = f"there is no model {row.model!r} here." if endpoint is None else f"it has failed: {endpoint.reason}"
            return _refused(request_id, ApiError(404, why, param="model", code="model_not_found"))
        sink, open_request = _Collected(), OpenRequest(key_id=key_id)
        body = msgspec.json.encode(row.body)
        # As its other requests are routed: all of them to one revision.
        shape = shape_of(body, owner, endpoint.adapter_of(row.model))
        try:
            open_request.reservation = self._reserve(key_id, shape)
        except ApiError as error:
            return _refused(request_id, error)
        asked = GatewayRequest(request_id, owner, route, body, shape, ROW_PATIENCE_S)
        copies = CopiedAnswers(None, self._keeper, endpoint)
        proxy = Proxy(asked, endpoint, copies.sink(asked, sink), self._log)
        self._requests.begin(open_request)
        try:
            with open_request.cuttable():
                await proxy.run()
            return _collected(request_id, sink)
        except RequestAborted as error:
            try:
                proxy.cut(error.cut)
            except ApiError as refusal:
                return _refused(request_id, refusal)
            return _collected(request_id, sink)
        except ApiError as error:
            return _refused(request_id, error)
        except asyncio.CancelledError:  # the batch ends, which is no fault of the endpoint
            proxy.cut(HUNG_UP)
            raise
        finally:
            copies.keep(asked)
            record = RowRecord(**vars(proxy.record()))
            self._requests.end(open_request, record, proxy.unknown_usage(), endpoint.rates)

    def _reserve(self, key_id: str | None, shape: RequestShape) -> KeyReservation | None:
        """A row counts as any other request of its key does; over its quota it waits."""
        key = self._state.key(key_id) if key_id is not None else None
        return self._quotas.reserve(key, shape.num_tokens) if key is not None and key.limits.any else None

    def _find(self, model: str) -> EndpointController | None:
        try:
            endpoint = self._endpoints.get(self._endpoints.endpoint_of(model))
        except NotFound:
            return None
        return endpoint if endpoint.is_active or endpoint.state == "failed" else None


class _Error(msgspec.Struct):
    code: str | int | None = None


class _RowRefusal(msgspec.Struct):
    error: _Error | None = None


def _collected(request_id: str, sink: _Collected) -> RowAnswer:
    code = None
    if sink.status >= 400:
        try:
            told = msgspec.json.decode(sink.body, type=_RowRefusal).error
        except msgspec.MsgspecError:
            told = None
        code = None if told is None or told.code is None else str(told.code)
    return RowAnswer(request_id, sink.status, sink.body, code, sink.retry_after_s)


def _refused(request_id: str, error: ApiError) -> RowAnswer:
    body = msgspec.json.encode(error.body())
    return RowAnswer(request_id, error.status, body, error.code, error.retry_after_s)
