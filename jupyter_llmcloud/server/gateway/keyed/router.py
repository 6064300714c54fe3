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

from tornado.httputil import HTTPHeaders, RequestStartLine
from tornado.routing import AnyMatches, Router, Rule

from jupyter_llmcloud.core.serving.keys import looks_like_key, may_infer, parse_key
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.server.api.base import MAX_BODY, length_of
from jupyter_llmcloud.server.gateway.auth import KEY_HEADERS, as_user
from jupyter_llmcloud.server.gateway.keyed.known_keys import KnownKeys
from jupyter_llmcloud.server.gateway.keyed.request import KeyedRequest, header_lines
from jupyter_llmcloud.server.gateway.metrics import note_answer
from jupyter_llmcloud.server.gateway.open_requests import INFERENCE_ROUTES

if TYPE_CHECKING:
    from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest
    from tornado.web import Application, RequestHandler

    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry
    from jupyter_llmcloud.server.gateway.key_alerts import KeyMonitor
    from jupyter_llmcloud.server.gateway.keyed.exchange import Services
    from jupyter_llmcloud.storage.server_state import ServerState, StoredKey

KEYED = "jupyter_llmcloud_keyed"  # in the settings of the web application
MAX_HOSTS = 64
_BEARER = "Bearer "
_NOT_PLAIN = ("Transfer-Encoding", "Content-Encoding", "Expect", "Origin", *KEY_HEADERS)
_SETTINGS = ("headers", "allow_remote_access", "local_hostnames")  # that decide about headers, and about hosts
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
        self._handler = handler
        self._handler_services = handler_services
        self.services = services
        self._state = state
        self._endpoints = endpoints
        self._alerts = alerts
        self._known = KnownKeys(state)
        self._hosts: set[str] = set()
        self._learned_with: list[Any] = []
        self.head = b""
        root = application.settings["base_url"].rstrip("/")
        self._routes = {f"{root}/llmcloud/v1/{route}": route for route in INFERENCE_ROUTES}

    def add(self) -> None:
        """Before all handlers of the application."""
        self._application.settings[KEYED] = self
        self._application.default_router.rules.insert(0, Rule(AnyMatches(), self))

    def learn(self, host: str, headers: HTTPHeaders) -> None:
        """A handler has let in a request to this host; the headers are those of every answer of this server."""
        if len(self._hosts) >= MAX_HOSTS or self._settings() != self._learned_with:
            self._hosts.clear()
        self._hosts.add(host)
        self._learned_with = copy.deepcopy(self._settings())
        self.head = header_lines({name: told for name, told in headers.items() if name not in _OF_ONE_ANSWER})

    def _settings(self) -> list[Any]:
        """What answers depended on when they were learned from: it may be changed while the server runs."""
        return [self._application.settings.get(name) for name in _SETTINGS]

    # --- who may come this way ---

    def find_handler(self, request: HTTPServerRequest, **_: Any) -> HTTPMessageDelegate | None:
        """What answers a request; None: a handler."""
        route, headers = self._routes.get(request.uri or ""), request.headers
        if route is None or request.method != "POST" or headers.get("Host") not in self._hosts:
            return None
        if request.version != "HTTP/1.1" or headers.get("Connection", "keep-alive").lower() != "keep-alive":
            return None
        length = length_of(headers.get("Content-Length", ""))
        if length is None or length > MAX_BODY:
            return None
        if any(name in headers for name in _NOT_PLAIN) or self._settings() != self._learned_with:
            return None
        key = self._valid_key(headers.get("Authorization", ""))
        return None if key is None else KeyedRequest(self, request, route, key)

    def _valid_key(self, credential: str) -> StoredKey | None:
        text = credential.removeprefix(_BEARER)
        if text is credential or not looks_like_key(text):
            return None
        stored = self._known.get(text) or self._read_key(text)
        return stored if stored is not None and stored.is_valid(time.time()) else None

    def _read_key(self, text: str) -> StoredKey | None:
        stamp, key = self._state.stamp(), parse_key(text)
        stored = self._state.key(key.id) if key is not None else None
        if key is None or stored is None or not key.matches(stored.digest):
            return None
        self._known.put(text, stored, stamp)
        return stored

    def endpoint_of(self, model: str, key: StoredKey) -> tuple[EndpointController, str] | None:
        """The endpoint that is asked for a model, and its adapter; None where that is refused."""
        name = self._endpoints.endpoint_of(model)
        try:
            endpoint = self._endpoints.get(name)
        except NotFound:
            return None
        if not endpoint.is_active or endpoint.state == "failed" or not may_infer(key.scopes, name):
            return None
        return endpoint, endpoint.adapter_of(model)

    # --- what comes of it ---

    async def refuse(self, request: HTTPServerRequest, route: str, body: bytes) -> None:
        """Have the handler say why."""
        path_args = [route.encode()]
        handler = self._application.get_handler_delegate(request, self._handler, self._handler_services, path_args)
        start = RequestStartLine(request.method or "", request.uri or "", request.version)
        if (prepared := handler.headers_received(start, request.headers)) is not None:
            await prepared
        if (taken := handler.data_received(body)) is not None:
            await taken
        handler.finish()

    def asked(self, key: StoredKey, address: str) -> None:
        """A request with a key has come this way, from this address."""
        self._alerts.asked(key.id, address)

    def answered(self, request: HTTPServerRequest, key: StoredKey, status: int) -> None:
        """It is over. The handler that was not needed notes and logs it: it has the name by which that is known."""
        self._alerts.answered(key.id, status)
        if status < 400:
            note_answer(self._handler, request, status, self._application.settings)
            return
        handler = self._handler(self._application, request, **self._handler_services)
        connection: Any = request.connection
        connection.set_close_callback(None)  # it has nothing to hear of any more
        handler.set_status(status)
        handler.current_user = as_user(key)
        handler._log()
