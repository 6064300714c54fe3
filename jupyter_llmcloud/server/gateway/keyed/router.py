"""Which requests are answered without a handler of Jupyter's.

Of what a handler does for a request (Jupyter's users, origins of pages, templates, errors of every kind) one that came
with a valid key needs nothing, and somebody waits for its first token. A request goes this way when it is plain: posted
to a model with a key, its body of a known and moderate length, from no page. Whatever else is to be said of it is left
to the handler: this way answers, or hands on.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.routing import AnyMatches, Router, Rule

from jupyter_llmcloud.core.serving.keys import looks_like_key, may_infer, parse_key
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.server.api.base import MAX_BODY, length_of
from jupyter_llmcloud.server.gateway.auth import KEY_HEADERS, as_user
from jupyter_llmcloud.server.gateway.keyed.answer import Admitted, Asked, header_lines
from jupyter_llmcloud.server.gateway.keyed.exchange import Caller
from jupyter_llmcloud.server.gateway.keyed.known_keys import KnownKey, KnownKeys
from jupyter_llmcloud.server.gateway.keyed.request import KeyedRequest
from jupyter_llmcloud.server.gateway.keyed.taking_over import PlainConnections
from jupyter_llmcloud.server.gateway.metrics import note_answer
from jupyter_llmcloud.server.gateway.open_requests import INFERENCE_ROUTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tornado.httputil import HTTPMessageDelegate
    from tornado.iostream import IOStream
    from tornado.web import Application, RequestHandler

    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry
    from jupyter_llmcloud.server.gateway.key_alerts import KeyMonitor
    from jupyter_llmcloud.server.gateway.keyed.exchange import Services
    from jupyter_llmcloud.storage.server_state import ServerState, StoredKey

KEYED = "jupyter_llmcloud_keyed"  # in the settings of the web application
MAX_HOSTS = 64
_BEARER = "Bearer "
_NOT_PLAIN = ("transfer-encoding", "content-encoding", "expect", "origin", *map(str.lower, KEY_HEADERS))
_OF_ONE_ANSWER = ("Date", "Content-Type", "Content-Length", "X-Request-Id", "Vary")


class KeyedRouter(Router):
    """Takes plain requests with a key; every other one is left to the handlers.

    Args:
        handler: that takes what is handed on, with its services.
    """

    def __init__(
        self, application: Application, handler: type[RequestHandler], handler_services: dict[str, Any],
        services: Services, state: ServerState, endpoints: EndpointRegistry, alerts: KeyMonitor,
    ) -> None:  # fmt: skip
        self._application = application
        self._behind = handler, handler_services
        self.services = services
        self._state = state
        self._endpoints = endpoints
        self._alerts = alerts
        self._known = KnownKeys(state)
        self._hosts: set[str] = set()
        self._learned_with: list[Any] = []
        self.head = b""
        self._connections = PlainConnections(self, application)
        root = application.settings["base_url"].rstrip("/")
        self._routes = {f"{root}/llmcloud/v1/{route}": route for route in INFERENCE_ROUTES}

    def add(self) -> None:
        """Before all handlers of the application."""
        self._application.settings[KEYED] = self
        requests = self.services.requests
        requests.after_writing(self._known.look_again)
        self._application.default_router.rules.insert(0, Rule(AnyMatches(), self))

    def learn(self, host: str, headers: HTTPHeaders) -> None:
        """A handler has let in a request to this host; the headers are those of every answer of this server."""
        if len(self._hosts) >= MAX_HOSTS or self._settings() != self._learned_with:
            self._hosts.clear()
        self._hosts.add(host)
        self._learned_with = copy.deepcopy(self._settings())
        self.head = header_lines({name: told for name, told in headers.items() if name not in _OF_ONE_ANSWER})

    def _settings(self) -> list[Any]:
        """What decides about headers, and about hosts: it may be changed while the server runs."""
        told = self._application.settings
        return [told.get("headers"), told.get("allow_remote_access"), told.get("local_hostnames")]

    # --- who may come this way ---

    def find_handler(self, request: HTTPServerRequest, **_: Any) -> HTTPMessageDelegate | None:
        """What answers a request; None: a handler."""
        if request.method != "POST" or request.version != "HTTP/1.1":
            return None
        admitted = self.admit(request.uri or "", request.headers, request.remote_ip or "")
        if admitted is None:
            return None
        connection: Any = request.connection
        if self._connections.may_take(connection.stream):
            return self._connections.take(request, admitted.length)
        return KeyedRequest(self, request, admitted.asked)

    def admit(self, uri: str, headers: Mapping[str, str], address: str) -> Admitted | None:
        """The request that is posted with these headers; None: it is for a handler."""
        route = self._routes.get(uri)
        if route is None or headers.get("host") not in self._hosts:
            return None
        if headers.get("connection", "keep-alive").lower() != "keep-alive":
            return None
        length = length_of(headers.get("content-length", ""))
        if length is None or length > MAX_BODY:
            return None
        if any(name in headers for name in _NOT_PLAIN) or self._settings() != self._learned_with:
            return None
        known = self._valid_key(headers.get("authorization", ""))
        if known is None:
            return None
        caller = Caller.of(f"key:{known.key.id}", known.key, headers)
        return Admitted(Asked(uri, route, known, address, caller), length)

    def admits_again(self, asked: Asked, length: int) -> bool:
        """Whether there may be another one with the same head, but for its length; if not, it is read as a new one."""
        if length > MAX_BODY or asked.caller.headers.get("host") not in self._hosts:
            return False
        if self._settings() != self._learned_with or not self._known.is_current(asked.known):
            return False
        return asked.known.key.is_valid(time.time())

    def _valid_key(self, credential: str) -> KnownKey | None:
        text = credential.removeprefix(_BEARER)
        if text is credential or not looks_like_key(text):
            return None
        known = self._known.get(text) or self._read_key(text)
        return known if known is not None and known.key.is_valid(time.time()) else None

    def _read_key(self, text: str) -> KnownKey | None:
        stamp, key = self._state.stamp(), parse_key(text)
        stored = self._state.key(key.id) if key is not None else None
        if key is None or stored is None or not key.matches(stored.digest):
            return None
        return self._known.put(text, stored, stamp)

    def endpoint_of(self, model: str, key: StoredKey) -> tuple[EndpointController, str] | None:
        """The endpoint that is asked for a model, and its adapter; None where that is refused."""
        name = self._endpoints.endpoint_of(model)
        try:
            endpoint = self._endpoints.get(name)
        except NotFound:
            return None
        if not endpoint.is_active or not may_infer(key.scopes, name):
            return None
        return endpoint, endpoint.adapter_of(model)

    # --- what comes of it ---

    async def refuse(self, request: HTTPServerRequest, route: str, body: bytes) -> None:
        """Have the handler say why."""
        path_args = [route.encode()]
        handler = self._application.get_handler_delegate(request, *self._behind, path_args)
        start = RequestStartLine(request.method or "", request.uri or "", request.version)
        if (prepared := handler.headers_received(start, request.headers)) is not None:
            await prepared
        if (taken := handler.data_received(body)) is not None:
            await taken
        handler.finish()

    def proven(self, stream: IOStream) -> None:
        """A request on this connection was answered: further ones need no tornado."""
        if not getattr(self._application.settings.get("serverapp"), "trust_xheaders", False):
            self._connections.prove(stream)

    def asked(self, key: StoredKey, address: str) -> None:
        """A request with a key has come this way, from this address."""
        self._alerts.asked(key.id, address)

    def answered(self, asked: Asked, status: int, seconds: float) -> None:
        """It is over. The handler that was not needed notes and logs it: it has the name by which that is known."""
        self._alerts.answered(asked.known.key.id, status)
        if status < 400:
            note_answer(self._behind[0], "POST", seconds, status, self._application.settings)
            return
        kind, services = self._behind
        handler = kind(self._application, _Answered(asked, seconds), **services)
        handler.set_status(status)
        handler.current_user = as_user(asked.known.key)
        handler._log()

    def close(self) -> None:
        """The server ends."""
        self._connections.close()


class _NoConnection:
    """Stands for that of a request that is over."""

    def __init__(self, address: str) -> None:
        self.context = self
        self.remote_ip = address
        self.protocol = "http"

    def set_close_callback(self, callback: Any) -> None:
        """It has nothing to tell any more."""


class _Answered(HTTPServerRequest):
    """A request that is over, for the log."""

    def __init__(self, asked: Asked, seconds: float) -> None:
        line = RequestStartLine("POST", asked.uri, "HTTP/1.1")
        connection: Any = _NoConnection(asked.address)
        super().__init__(start_line=line, headers=HTTPHeaders(asked.caller.headers), connection=connection)
        self._seconds = seconds

    def request_time(self) -> float:
        """How long it took."""
        return self._seconds
