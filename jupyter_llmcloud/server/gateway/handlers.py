"""`/llmcloud/v1`: models, completions, chat completions."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from tornado import web

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.server.api.base import MAX_BODY
from jupyter_llmcloud.server.endpoints.controller import LiveEndpoint
from jupyter_llmcloud.server.gateway.auth import GatewayHandler, gateway_access
from jupyter_llmcloud.server.gateway.open_requests import OpenRequest
from jupyter_llmcloud.server.gateway.proxy import Forwarding

BODY_TIMEOUT_S = 30.0


class Asked(msgspec.Struct):
    """What the gateway reads of a request; all else is the replica's to judge."""

    model: str
    stream: bool | None = False


_decode = msgspec.json.Decoder(Asked).decode


def parse(body: bytes) -> Asked:
    """The model that a body names; 400 when it is not JSON of that form."""
    try:
        return _decode(body)
    except msgspec.ValidationError as error:
        param = next((name for name in ("model", "stream") if name in str(error)), None)
        raise ApiError(400, f"the body is not a request: {error}.", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}.", code="invalid_json") from None


class ModelsHandler(GatewayHandler):
    """The endpoints, as models."""

    @gateway_access("read")
    async def get(self) -> None:
        """List those that whoever asks may use (a key without any infer scope sees all names)."""
        await self.context.started()
        self.require_models()
        lists_all = self.key is None or not any(scope.startswith("infer:") for scope in self.key.scopes)
        endpoints = [live for live in self.context.endpoints.list() if live.is_active]
        rows = [as_model(live) for live in endpoints if lists_all or self.may_ask(live.name)]
        self.finish({"object": "list", "data": rows})


class ModelHandler(GatewayHandler):
    """One endpoint, as a model."""

    @gateway_access("read")
    async def get(self, name: str) -> None:
        """Tell of it."""
        await self.context.started()
        self.require_models()
        self.finish(as_model(self.endpoint(name)))


def as_model(endpoint: LiveEndpoint) -> dict[str, Any]:
    """An endpoint in OpenAI's words."""
    stored = endpoint.stored
    told = {
        "id": stored.name,
        "object": "model",
        "created": int(stored.created),
        "owned_by": "jupyter-llmcloud",
    }
    return {**told, "state": stored.state, "revision": stored.revision}


@web.stream_request_body
class InferenceHandler(GatewayHandler):
    """A request to a model: let in here, answered by a replica, its bytes copied."""

    def initialize(self, route: str) -> None:
        """`route` is where the replica answers the same request."""
        self.route = route
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self._answering: asyncio.Task[Any] | None = None
        self.cut_because = ""

    async def prepare(self) -> None:  # type: ignore[override]
        """Refuse what can be refused before the body is read."""
        connection: Any = self.request.connection
        # Twice the limit, so that a body that grows beyond it is answered with 413 and not just cut off.
        connection.set_max_body_size(2 * MAX_BODY)
        connection.set_body_timeout(BODY_TIMEOUT_S)
        await super().prepare()
        length = self.request.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {MAX_BODY} bytes.", code="request_too_large")

    def data_received(self, chunk: bytes) -> None:
        """Collect the body, up to the limit."""
        self._num_bytes += len(chunk)
        if self._num_bytes <= MAX_BODY:
            self._chunks.append(chunk)

    @gateway_access("execute")
    async def post(self) -> None:
        """Ask the model."""
        if self._num_bytes > MAX_BODY:
            raise self._too_large()
        await self.context.started()
        body = b"".join(self._chunks)
        asked = parse(body)
        endpoint = self.endpoint(asked.model)
        self.note_activity()
        forwarding = Forwarding(self, endpoint, body)
        request = OpenRequest(self.key.id if self.key else None, self._cut_for_key)
        self.context.requests.begin(request)
        try:
            await self._answer(forwarding)
        finally:
            self.note_activity()
            self.context.requests.end(request, forwarding.usage())

    async def _answer(self, forwarding: Forwarding) -> None:
        answering = self._answering = asyncio.current_task()
        try:
            if not self.cut_because:
                await forwarding.run()
        except asyncio.CancelledError:
            if not self.cut_because:
                raise
            assert answering is not None
            answering.uncancel()
        finally:
            self._answering = None
        if self.cut_because:
            forwarding.note_cut(self.cut_because)
            if self.cut_because != "hung up":
                message = "the key of this request is not valid any more."
                forwarding.tell(ApiError(401, message, code="invalid_api_key"))

    def on_connection_close(self) -> None:
        """The client has gone: nobody needs the rest of the answer."""
        self._cut("hung up")

    def _cut_for_key(self) -> None:
        self._cut("key revoked")

    def _cut(self, reason: str) -> None:
        self.cut_because = self.cut_because or reason
        if self._answering is not None:
            self._answering.cancel()

    def note_activity(self) -> None:
        """Somebody uses this server: the idle culler shall not end it."""
        from jupyter_server._tz import utcnow

        self.settings["last_activity_times"]["llmcloud"] = utcnow()
        self._noted = time.monotonic()

    def note_streaming(self) -> None:
        """As `note_activity`, at most once a second."""
        if time.monotonic() - self._noted > 1:
            self.note_activity()


class UnknownPathHandler(GatewayHandler):
    """Anything else below `/llmcloud/v1`: 404 as OpenAI clients know it, and only for who may ask."""

    async def prepare(self) -> None:  # type: ignore[override]
        """Answer."""
        await super().prepare()
        raise ApiError(404, f"{self.request.method} {self.request.path} does not exist here.", code="unknown_url")
