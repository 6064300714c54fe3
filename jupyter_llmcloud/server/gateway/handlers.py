"""`/llmcloud/v1`: models, completions, chat completions."""

from __future__ import annotations

import asyncio
import time
from codecs import BOM_UTF8
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import msgspec
from tornado import web
from tornado.iostream import StreamClosedError

from jupyter_llmcloud.core.serving.content_encoding import check_encoding, decoded
from jupyter_llmcloud.core.serving.endpoint.response_id import replica_of, unknown_response
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.core.serving.unknown_paths import model_in, unknown_path
from jupyter_llmcloud.protocol.http.gateway import InferenceRequest, Model, Models
from jupyter_llmcloud.protocol.openai.decoding import decode
from jupyter_llmcloud.server.api.base import MAX_BODY, length_of
from jupyter_llmcloud.server.endpoints.replica_client import ReplicaLost
from jupyter_llmcloud.server.gateway.auth import GatewayHandler, gateway_access
from jupyter_llmcloud.server.gateway.keyed.exchange import KEY_HEADER, Caller, Exchange, Services
from jupyter_llmcloud.server.gateway.keyed.router import KEYED, KeyedRouter
from jupyter_llmcloud.server.gateway.request_shape import shape_of
from jupyter_llmcloud.storage.server_state import RequestRecord

if TYPE_CHECKING:
    from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape
    from jupyter_llmcloud.server.answers.keeper import Keeper
    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.gateway.key_quotas import KeyQuotas
    from jupyter_llmcloud.server.gateway.open_requests import OpenRequests

SLOW_READER_S = 30.0
BODY_TIMEOUT_S = 30.0
DROPPED_BODY = 32 << 20
# A thousand texts at once, as clients cut documents: OpenAI's own 300,000 tokens are 2 MiB when they come as numbers.
MAX_EMBEDDED = 4 << 20


_NONE: Mapping[str, str] = {}


def parse(body: bytes) -> InferenceRequest:
    """The model that a body names; 400 when it is not JSON of that form."""
    return decode(body, InferenceRequest)


class ModelsHandler(GatewayHandler):
    """The endpoints, as models."""

    @gateway_access("read")
    async def get(self) -> None:
        """List the models that whoever asks may use (a key without any infer scope sees all names)."""
        await self.started()
        self.require_models()
        lists_all = self.key is None or not any(scope.startswith("infer:") for scope in self.key.scopes)
        endpoints = [live for live in self.endpoints.list() if live.is_active]
        allowed = [live for live in endpoints if lists_all or self.may_ask(live.name)]
        rows = [as_model(live, adapter) for live in allowed for adapter in ("", *live.adapters)]
        self.finish(msgspec.json.encode(Models(data=rows)))


class ModelHandler(GatewayHandler):
    """One endpoint, as a model."""

    @gateway_access("read")
    async def get(self, name: str) -> None:
        """Tell of a model."""
        await self.started()
        self.require_models()
        endpoint = self.endpoint(name)
        self.finish(msgspec.json.encode(as_model(endpoint, endpoint.adapter_of(name))))


def as_model(endpoint: EndpointController, adapter: str = "") -> Model:
    """An endpoint in OpenAI's words, or one of its adapters."""
    stored = endpoint.stored
    ident = f"{stored.name}:{adapter}" if adapter else stored.name
    return Model(id=ident, created=int(stored.created), state=stored.state, revision=stored.current.fingerprint)


@web.stream_request_body
class InferenceHandler(GatewayHandler):
    """A request to a model: let in here, answered by a replica, its bytes copied. It is the sink of its proxy."""

    max_body = MAX_BODY

    def initialize(  # type: ignore[override]
        self, requests: OpenRequests, quotas: KeyQuotas, keeper: Keeper, **shared: Any
    ) -> None:
        """Takes the services of the gateway.

        Args:
            requests: those that are being answered.
            quotas: what keys have used of late.
            keeper: of requests to endpoints that were started to keep them.
        """
        super().initialize(**shared)
        services = Services(requests, quotas, keeper, self.settings, self.log)
        self._exchange = Exchange(services, self.request_id, self.started_at)
        self.quotas = quotas
        self._body = bytearray()
        self._num_bytes = 0
        self._asked_for = ""
        self._num_large = 0  # bytes that the budget of large bodies has lent
        self._late: asyncio.TimerHandle | None = None  # ends a connection whose body does not come

    async def prepare(self) -> None:  # type: ignore[override]
        """Refuse what can be refused before the body is read."""
        if self.asked_route == "embeddings":
            self.max_body = MAX_EMBEDDED
        connection: Any = self.request.connection
        told = self.request.headers.get("Content-Length", "0")
        length = length_of(told)
        # One that says that it is larger yet is refused below, in words; the connection then ends with the answer.
        connection.set_max_body_size(max(length or 0, self.max_body + DROPPED_BODY))
        # Not tornado's own timeout, which has the body read by another task even when all of it is there.
        self._late = asyncio.get_running_loop().call_later(BODY_TIMEOUT_S, connection.stream.close)
        if length is None:
            raise ApiError(400, f"Content-Length is {told[:40]!r}, which is no number.", code="invalid_header")
        if length > self.max_body + DROPPED_BODY:
            raise self._too_large()
        try:
            await super().prepare()
            self._teach()
            check_encoding(self.request.headers.get("Content-Encoding", ""))
            if length > self.max_body:
                raise self._too_large()
        except (ApiError, web.HTTPError) as error:
            if length == 0 and "Transfer-Encoding" not in self.request.headers:
                raise
            if "Expect" in self.request.headers:  # the body waits for a word that it does not get
                raise
            status = error.status if isinstance(error, ApiError) else error.status_code
            await self._refuse_and_read_on(self.as_api_error(error, status), is_large=length > self.max_body)

    def _teach(self) -> None:
        """Further plain requests to this host, with a valid key, need no handler."""
        router: KeyedRouter | None = self.settings.get(KEYED)
        if router is not None and self.key is not None and "Origin" not in self.request.headers:
            router.learn(self.request.headers.get("Host", ""), self._headers)

    async def _refuse_and_read_on(self, error: ApiError, *, is_large: bool) -> None:
        """Answer now, and finish when the body has come, which is dropped.

        A connection on which a body is still to come is closed when its request is finished: a client that is sending
        would not get to see the answer, and one that keeps connections would find it broken by its next request.
        """
        content = msgspec.json.encode(self.error_body(error))
        self.set_error_headers(error)
        self.set_header("Content-Type", "application/json")
        self.set_header("Content-Length", str(len(content)))
        if is_large:
            self.set_header("Connection", "close")
        self.write(content)
        assert self.request.method is not None
        setattr(self, self.request.method.lower(), self._finish_refused)
        await self.flush()

    def _finish_refused(self, *_: Any) -> None:
        """Stands for the method of a request that was refused, now that all of its body has come."""
        self.finish()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body} bytes.", code="request_too_large")

    def data_received(self, chunk: bytes) -> None:
        """Collect the body, up to the limit."""
        self._num_bytes += len(chunk)
        if self._num_bytes <= self.max_body and not self._headers_written and self._has_room(len(chunk)):
            self._body += chunk

    def _has_room(self, num_bytes: int) -> bool:
        """Whether memory is left for more of a large body; once there is none, the rest of it is dropped."""
        large = min(num_bytes, self._num_bytes - MAX_BODY)
        if large <= 0:
            return True
        if self._num_large < 0 or not self.quotas.hold(large):
            self._free_body()
            self._num_large = -1
            return False
        self._num_large += large
        return True

    def _free_body(self) -> None:
        self.quotas.let_go(max(0, self._num_large))
        self._num_large = 0
        self._body.clear()

    def _wait_no_longer(self) -> None:
        """For the body."""
        if self._late is not None:
            self._late.cancel()

    def _whole_body(self) -> bytes:
        """The body that has come. Raises ApiError when it is too large, or was for the moment."""
        self._wait_no_longer()
        if self._num_bytes > self.max_body:
            raise self._too_large()
        if self._num_large < 0:
            message = "this server holds as many large bodies as it can: ask again, or ask for less at once."
            raise ApiError(503, message, code="server_busy", retry_after_s=1)
        body = bytes(self._body)
        self._body.clear()  # it is not held twice
        if not body:
            raise ApiError(400, "The body is empty: send a JSON object.", code="invalid_json")
        return decoded(body, self.request.headers.get("Content-Encoding", ""), self.max_body).removeprefix(BOM_UTF8)

    @gateway_access("execute")
    async def post(self, route: str) -> None:
        """Ask a model, as OpenAI's API is asked; the answer is that of a replica, who may refuse what it cannot do."""
        body = self._whole_body()
        await self._ask(route, body, parse(body).model)

    async def _ask(self, route: str, body: bytes, model: str) -> None:
        await self.started()
        self._asked_for = model
        endpoint = self.endpoint(self._asked_for)
        self._exchange.note_activity()
        shape = shape_of(body, self.actor, endpoint.adapter_of(self._asked_for))
        await self.pass_on(endpoint, route, body, shape)

    async def pass_on(
        self,
        endpoint: EndpointController,
        route: str,
        body: bytes,
        shape: RequestShape,
        path: str = "",
        headers: Mapping[str, str] = _NONE,
    ) -> None:
        """Have a replica answer, as `Exchange.pass_on`."""
        self._exchange.reserve(self.key, shape)
        caller = Caller.of(self.actor, self.key, self.request.headers)
        await self._exchange.pass_on(caller, endpoint, route, body, shape, self, path=path, headers=headers)

    def on_finish(self) -> None:
        """What was refused before a replica was asked is written down as well, when it is known who asked."""
        super().on_finish()
        self._wait_no_longer()
        self._free_body()
        is_known = self.key is not None or getattr(self, "_jupyter_current_user", None) is not None
        if self._exchange.times is None and is_known and self.request.method == "POST":
            self._exchange.refused(
                RequestRecord(
                    request_id=self.request_id, actor=self.actor, endpoint=self._asked_for[:128],
                    route=self.asked_route, status=self.get_status(),
                    duration_s=time.perf_counter() - self.started_at, outcome="refused", t=time.time(),
                )
            )  # fmt: skip

    @property
    def asked_route(self) -> str:
        """As usage names it."""
        return self.path_args[0] if self.path_args else ""

    def set_default_headers(self) -> None:
        """Of every answer, errors too: how much the key has left."""
        super().set_default_headers()
        if self.key is not None:
            for name, value in self.quotas.headers(self.key).items():
                self.set_header(name, value)

    def set_error_headers(self, error: ApiError) -> None:
        """As everywhere; a connection on which a body waits for a word that it does not get ends with the answer."""
        super().set_error_headers(error)
        if "Expect" in self.request.headers and not self._num_bytes:
            self.set_header("Connection", "close")

    def on_connection_close(self) -> None:
        """The client has gone: nobody needs the rest of the answer."""
        super().on_connection_close()
        self._wait_no_longer()
        self._free_body()
        self._exchange.hung_up()

    # --- the sink of its proxy ---

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The status and the headers are known."""
        self.set_status(status)
        quota = self.quotas.headers(self.key) if self.key is not None else {}
        for name, value in {**headers, **quota}.items():
            self.set_header(name, value)
        connection: Any = self.request.connection
        connection.stream.set_nodelay(True)

    def write_chunk(self, chunk: bytes) -> bool:
        """Pass a piece on; whether the system has taken all of it."""
        self.write(chunk)
        self._exchange.piece()
        self.flush()
        connection: Any = self.request.connection
        return not (connection.stream.writing() or connection.stream.closed())

    async def drained(self) -> None:
        """Wait until the client has taken what was written; one that takes too long has hung up."""
        try:
            async with asyncio.timeout(SLOW_READER_S):
                await self.flush()
        except (TimeoutError, StreamClosedError):
            self._exchange.hung_up()
            self.request.connection.stream.close()  # type: ignore[union-attr]
            await asyncio.sleep(0)  # where the cut is felt

    def end(self, last: bytes, content_type: str) -> None:
        """The last of it."""
        self.finish(last or None, set_content_type=content_type)


@web.stream_request_body
class DeploymentHandler(InferenceHandler):
    """The same by Azure's paths, which name the model."""

    @property
    def asked_route(self) -> str:
        """As usage names it."""
        return self.path_args[1] if len(self.path_args) > 1 else ""

    @gateway_access("execute")
    async def post(self, model: str, route: str) -> None:  # type: ignore[override]
        """Ask the model that the path names, whatever the body names."""
        fields = decode(self._whole_body(), dict[str, msgspec.Raw])
        body = msgspec.json.encode({**fields, "model": model})
        await self._ask(route, body, model)


class StoredResponses(GatewayHandler):
    """Responses that replicas have given, and keep for a while."""

    async def pass_on(self, method: str, response_id: str, more: str = "") -> None:
        """Have the replica that keeps a response answer."""
        await self.started()
        mine = [live for live in self.endpoints.list() if live.is_active and self.may_ask(live.name)]
        named = replica_of(response_id)
        keeper = next((one for live in mine for one in live.ready_replicas() if one.id == named), None)
        if keeper is None:
            raise unknown_response(response_id)
        owner = {KEY_HEADER: self.key.id} if self.key is not None else {}
        try:
            status, body = await keeper.ask(method, f"/v1/responses/{response_id}{more}", owner)
        except ReplicaLost as error:
            raise ApiError(503, f"{error}: ask again.", code="replica_lost", retry_after_s=1) from None
        self.set_status(status)
        self.finish(body)


class StoredResponseHandler(StoredResponses):
    """One of them."""

    @gateway_access("read")
    async def get(self, response_id: str) -> None:
        """Tell it again, as a whole: who asks for a stream would find no event in that."""
        for name in ("stream", "starting_after"):
            if self.get_query_argument(name, "").lower() not in ("", "false", "0"):
                message = f"{name}: a response that was given is told again as a whole. Leave it out."
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        await self.pass_on("GET", response_id)

    @gateway_access("execute")
    async def delete(self, response_id: str) -> None:
        """Have it kept no longer."""
        await self.pass_on("DELETE", response_id)


class InputItemsHandler(StoredResponses):
    """What one of them answers."""

    @gateway_access("read")
    async def get(self, response_id: str) -> None:
        """List its input items, and those of the responses before it."""
        asked = {name: self.get_query_argument(name) for name in self.request.query_arguments}
        await self.pass_on("GET", response_id, f"/input_items?{urlencode(asked)}")


class UnknownPathHandler(GatewayHandler):
    """Anything else below `/llmcloud/v1`, or where /v1 was left out: 404 as OpenAI clients know it."""

    async def prepare(self) -> None:  # type: ignore[override]
        """Answer."""
        await super().prepare()
        if self.request.method == "OPTIONS":
            return
        if (name := model_in(self.request.path, self.base_url)) is not None:
            told = f"there is no model {name[:128]!r} here: GET {self.base_url}llmcloud/v1/models lists them."
            raise ApiError(404, told, param="model", code="model_not_found")  # by a name that none can have
        message = unknown_path(self.request.method or "", self.request.path, self.base_url)
        raise ApiError(404, message, code="unknown_url")
