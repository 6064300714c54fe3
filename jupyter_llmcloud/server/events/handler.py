"""The websocket `/llmcloud/api/events`, under the rules of Jupyter's own websockets."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from jupyter_core.utils import ensure_async
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.base.websocket import WebSocketMixin
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from jupyter_llmcloud.server.api.base import RESOURCE, access
from jupyter_llmcloud.server.api.endpoints import gateway_url
from jupyter_llmcloud.server.api.keys import owner_seen
from jupyter_llmcloud.server.events.stream import EventStream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from jupyter_llmcloud.server.events.service import EventService

MAX_MESSAGE = 1 << 16
LOGIN_ENDED = 4401  # the close code of a connection whose login is over


class EventsHandler(WebSocketMixin, WebSocketHandler, JupyterHandler):
    """One connection: signed in and authorized as for any read, and only as long as that is so."""

    recheck_s = 20.0

    def initialize(self, events: EventService, started: Callable[[], Awaitable[None]]) -> None:
        """`events` is what is told; `started` waits until the endpoints of an earlier server are known."""
        super().initialize()
        self._events = events
        self._started = started
        self._owner: str | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def set_default_headers(self) -> None:
        """None: those of Jupyter's pages make no sense here."""

    def get_compression_options(self) -> dict[str, Any] | None:
        """As Jupyter is set up."""
        options: dict[str, Any] | None = self.settings.get("websocket_compression_options", None)
        return options

    @property
    def max_message_size(self) -> int:
        """What clients say is short."""
        return MAX_MESSAGE

    @access("read")
    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Open the websocket: clusters, worlds, runs, endpoints and keys as they change (see ServerMessage)."""
        await self._started()
        self._owner = await owner_seen(self)
        await super().get(*args, **kwargs)

    def open(self, *args: str, **kwargs: str) -> None:
        """It is open: one task writes, one asks again and again whether the login holds."""
        super().open(*args, **kwargs)
        self.set_nodelay(True)
        self._stream = EventStream(self._events, self._send, gateway_url(self.request, self.base_url), self._owner)
        self._tasks = [asyncio.ensure_future(self._tell()), asyncio.ensure_future(self._guard())]

    async def _send(self, data: bytes) -> None:
        await self.write_message(data)  # done when it has left for the network: a slow client is waited for

    async def _tell(self) -> None:
        try:
            with contextlib.suppress(WebSocketClosedError):
                await self._stream.run()
        except Exception:
            self.log.exception("the events of a client have failed")
            self.close(1011, "the server failed")

    def on_message(self, message: str | bytes) -> None:
        """The client says something."""
        self._stream.receive(message)

    def on_close(self) -> None:
        """It is gone."""
        super().on_close()
        for task in self._tasks:
            task.cancel()

    # --- the login ---

    async def _guard(self) -> None:
        while True:
            await asyncio.sleep(self.recheck_s)
            if not await self._is_allowed():
                self.close(LOGIN_ENDED, "the login has ended")
                return

    async def _is_allowed(self) -> bool:
        """Asks Jupyter anew, as if the request came now."""
        again = JupyterHandler(self.application, self.request)
        user = await ensure_async(self.identity_provider.get_user(again))
        if user is None:
            return False
        again.current_user = user
        return bool(await ensure_async(self.authorizer.is_authorized(again, user, "read", RESOURCE)))
