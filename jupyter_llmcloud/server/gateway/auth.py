"""The OpenAI surface: who may ask, with what, and how an error looks there."""

from __future__ import annotations

import functools
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote_plus

import msgspec
from jupyter_server.auth.decorator import authorized
from jupyter_server.auth.identity import User
from jupyter_server.base.handlers import APIHandler, JupyterHandler
from tornado import web

from jupyter_llmcloud.core.serving.keys import covers, looks_like_key, may_infer, may_read_models, parse_key
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.server.api.base import RESOURCE
from jupyter_llmcloud.server.api.cross_origin import NamedOrigins
from jupyter_llmcloud.server.gateway.metrics import note_answer

if TYPE_CHECKING:
    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry
    from jupyter_llmcloud.server.gateway.key_alerts import KeyMonitor
    from jupyter_llmcloud.storage.server_state import ServerState, StoredKey

KEY_HEADERS = ("X-Api-Key", "Api-Key")  # of other clients; the second one of those for Azure
Method = TypeVar("Method", bound=Callable[..., Any])


def gateway_access(action: str, reply: type[Any] | None = None) -> Callable[[Method], Method]:
    """The access rule of what models answer: a scoped key within its scopes, or whoever Jupyter authorizes.

    Args:
        action: for which Jupyter must authorize a user.
        reply: the struct that the method answers, for the OpenAPI document; None: a replica answers.
    """

    def decorate(method: Method) -> Method:
        as_user: Any = authorized(action, resource=RESOURCE)(method)

        @functools.wraps(method)
        async def admitted(self: GatewayHandler, *args: Any) -> None:
            await (method if self.key is not None else as_user)(self, *args)

        guarded: Any = web.authenticated(admitted)
        guarded.llmcloud_access = (action, RESOURCE)
        guarded.llmcloud_reply = reply
        return guarded

    return decorate


class GatewayHandler(NamedOrigins, APIHandler):
    """Base of `/llmcloud/v1`. A scoped key is tried against our own table alone, and never becomes a Jupyter login."""

    key: StoredKey | None = None
    known_key_id: str | None = None  # also of a key that is not valid any more, or came with another secret

    def initialize(
        self,
        state: ServerState,
        endpoints: EndpointRegistry,
        alerts: KeyMonitor,
        started: Callable[[], Awaitable[None]],
    ) -> None:
        """What every route here uses; `started` waits until the endpoints of an earlier server are known."""
        self.state = state
        self.endpoints = endpoints
        self.alerts = alerts
        self.started = started
        self.started_at = time.perf_counter()
        self.request_id = f"req-{uuid.uuid4().hex}"
        self.head = self.get  # tornado leaves the body out

    @property
    def actor(self) -> str:
        """Who asks, as usage names them."""
        if self.key is not None:
            return f"key:{self.key.id}"
        return getattr(self.current_user, "username", None) or "unknown"

    async def prepare(self) -> None:  # type: ignore[override]
        """Find out who asks, before any of the body is read."""
        self.set_header("X-Request-Id", self.request_id)
        if self.request.method == "OPTIONS":
            return
        if self._has_key_in_query():
            raise ApiError(
                401, "a key in the URL ends up in logs and histories: send it as Authorization: Bearer KEY.",
                code="key_in_query",
            )  # fmt: skip
        presented = self._presented_key()
        if presented is None:
            await self._prepare_jupyter()
        elif not self.check_host():
            raise ApiError(403, "this server does not answer under that host name.", code="host_not_allowed")
        else:
            self._prepare_key(presented)

    def _presented_key(self) -> str | None:
        scheme, _, credential = self.request.headers.get("Authorization", "").partition(" ")
        candidates = [credential.strip() if scheme.lower() in ("bearer", "token") else ""]
        candidates += [self.request.headers.get(name, "").strip() for name in KEY_HEADERS]
        return next((text for text in candidates if looks_like_key(text)), None)

    def _has_key_in_query(self) -> bool:
        return any(looks_like_key(unquote_plus(text)) for text in re.split("[=&;]", self.request.query))

    def _prepare_key(self, presented: str) -> None:
        key = parse_key(presented)
        stored = self.state.key(key.id) if key is not None else None
        if stored is not None:
            self.known_key_id = stored.id
            self.alerts.asked(stored.id, self.request.remote_ip or "")
        if key is None or stored is None or not key.matches(stored.digest):
            raise ApiError(401, "this key is not valid here.", code="invalid_api_key")
        if not stored.is_valid(time.time()):
            ending = "was revoked" if stored.revoked else "has expired"
            raise ApiError(401, f"key {stored.id} {ending}: ask for a new one.", code="invalid_api_key")
        self.key = stored
        self.current_user = self._jupyter_current_user = as_user(stored)
        # A header that a browser never sends by itself: no cookie, no XSRF check, no origin check.
        self._token_authenticated = True

    async def _prepare_jupyter(self) -> None:
        self.current_user = None
        try:
            await JupyterHandler.prepare(self, _redirect_to_login=False)
        except web.HTTPError:
            if self.current_user is not None:
                raise
        if self.current_user is None:
            hint = "send a key (Authorization: Bearer sk-llmc-...) or the token of this Jupyter server."
            raise ApiError(401, f"nobody is signed in: {hint}", code="invalid_api_key")
        if not self.check_origin():
            raise ApiError(403, "this origin is not allowed.", code="origin_not_allowed")

    def require_models(self) -> None:
        """Raise 403 unless the key may list models."""
        if self.key is not None and not may_read_models(self.key.scopes):
            raise ApiError(403, f"key {self.key.id} lacks the scope models:read.", code="scope_missing")

    def may_ask(self, endpoint: str) -> bool:
        """May whoever asks use this endpoint?"""
        return self.key is None or may_infer(self.key.scopes, endpoint)

    def endpoint(self, name: str) -> EndpointController:
        """The endpoint that `model` names; 403 outside the key's scope, 404 when there is none, 503 when it failed."""
        asked = self.endpoints.endpoint_of(name)
        base = asked.partition(":")[0]  # an adapter that is not there is told as such
        if self.key is not None and not (self.may_ask(base) or covers(self.key.scopes, base)):
            message = (
                f"key {self.key.id} may not ask model {name[:128]!r}: its scopes are {', '.join(self.key.scopes)}."
            )
            raise ApiError(403, message, param="model", code="scope_missing")
        try:
            endpoint = self.endpoints.get(asked)
        except NotFound:
            endpoint = None
        if endpoint is not None and endpoint.state == "failed":
            message = f"model {name!r} has failed: {endpoint.reason}"
            raise ApiError(503, message, param="model", code="model_failed")
        if endpoint is None or not endpoint.is_active:
            known = [live.name for live in self.endpoints.list() if live.is_active and self.may_ask(live.name)]
            hint = f" There is: {', '.join(known[:8])}." if known else ""
            message = f"there is no model {name[:128]!r} here.{hint}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return endpoint

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """`{"error": {message, type, param, code}}`."""
        error = self.as_api_error(kwargs.get("exc_info", (None, None, None))[1], status_code)
        self.set_error_headers(error)
        self.set_header("X-Request-Id", self.request_id)
        self.finish(msgspec.json.encode(self.error_body(error)))

    def as_api_error(self, error: BaseException | None, status_code: int) -> ApiError:
        """What was raised, as clients are told."""
        if isinstance(error, ApiError):
            return error
        if status_code == 405:
            told = f"{self.request.method} {self.request.path} is not possible"
            return ApiError(405, f"{told}: ask by {' or '.join(self._methods()[:-1])}.", code="method_not_allowed")
        message = getattr(error, "log_message", None) or self._reason
        return ApiError(status_code, f"{message} (HTTP {status_code})")

    def set_error_headers(self, error: ApiError) -> None:
        """The status of an error, and what else its answer tells above the body."""
        self.set_status(error.status)
        if error.status == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        elif error.status == 405:
            self.set_header("Allow", ", ".join(self._methods()))
        for name, value in error.headers().items():
            self.set_header(name, value)

    def _methods(self) -> list[str]:
        own = [name for name in ("GET", "POST", "DELETE") if _is_answered(getattr(self, name.lower()))]
        return [*own, *(["HEAD"] if "GET" in own else []), "OPTIONS"]

    def error_body(self, error: ApiError) -> Any:
        """An error as its clients know it."""
        return error.body()

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """As tornado's, but an ApiError brings its own status."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        super().send_error(error.status if isinstance(error, ApiError) else status_code, **kwargs)

    def on_finish(self) -> None:
        """The answer is complete, or an error was."""
        if self.known_key_id is not None:
            self.alerts.answered(self.known_key_id, self.get_status())

    def _log(self) -> None:
        # A line per answered question would say nothing that the table of usage does not.
        if self.get_status() >= 400:
            if self.request.query:
                self.request.uri = f"{self.request.path}?[...]"  # nothing here takes one, and it may hold a key
            super()._log()
        else:
            method, seconds = self.request.method or "", self.request.request_time()
            note_answer(type(self), method, seconds, self.get_status(), self.settings)

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        """An answer that is an error on purpose needs no traceback in the log."""
        if not isinstance(value, ApiError):
            super().log_exception(kind, value, trace)


def as_user(key: StoredKey) -> User:
    """Whoever asks with a key, as Jupyter names them: no user that it knows."""
    return User(f"llmcloud-key-{key.id}")


def _is_answered(method: Callable[..., Any]) -> bool:
    return getattr(method, "__func__", None) is not web.RequestHandler._unimplemented_method
