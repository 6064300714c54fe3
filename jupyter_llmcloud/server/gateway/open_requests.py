"""The requests that are being answered: counted, written down when over, and cut when their key is revoked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from jupyter_llmcloud.storage.server_state import RequestRecord

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.storage.server_state import ServerState

KEY_CHECK_EVERY_S = 0.5
WRITE_EVERY_S = 0.5
ROUTES = ("completions", "chat/completions")
IN_FLIGHT = Gauge("llmcloud_requests_in_flight", "Requests to endpoints that are being answered")
REQUESTS = Counter("llmcloud_requests_total", "Requests to endpoints", ["route", "status"])
FIRST_BYTE = Histogram("llmcloud_first_byte_seconds", "From a request to the first byte of its answer", ["route"])
_STATUSES = (200, 400, 401, 403, 404, 413, 429, 499, 500, 503)


@dataclass(eq=False)
class OpenRequest:
    """One request: whose key it came with, and how to cut it."""

    key_id: str | None
    cut: Callable[[], None]


class OpenRequests:
    """All requests to endpoints of this server."""

    def __init__(self, state: ServerState, log: Logger) -> None:
        self._state = state
        self._log = log
        self._open: set[OpenRequest] = set()
        self._usages: list[RequestRecord] = []
        self._watching: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None

    def begin(self, request: OpenRequest) -> None:
        """A request is let in."""
        self._open.add(request)
        IN_FLIGHT.inc()
        if request.key_id is not None and (self._watching is None or self._watching.done()):
            self._watching = asyncio.ensure_future(self._watch())

    def end(self, request: OpenRequest, usage: RequestRecord) -> None:
        """A request is over, however it ended."""
        self._open.discard(request)
        IN_FLIGHT.dec()
        status = usage.status if usage.status in _STATUSES else usage.status // 100 * 100
        REQUESTS.labels(usage.route, str(status)).inc()
        if usage.first_byte_s is not None:
            FIRST_BYTE.labels(usage.route).observe(usage.first_byte_s)
        self._usages.append(usage)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.ensure_future(self._write_soon())

    def check_keys(self) -> None:
        """Cut the requests whose key is not valid any more."""
        now = time.time()
        for request in list(self._open):
            if request.key_id is not None:
                key = self._state.key(request.key_id)
                if key is None or not key.is_valid(now):
                    request.cut()

    async def _watch(self) -> None:
        # Another server of the same user may have revoked a key, and any key may expire.
        while any(request.key_id is not None for request in self._open):
            await asyncio.sleep(KEY_CHECK_EVERY_S)
            self.check_keys()

    async def _write_soon(self) -> None:
        await asyncio.sleep(WRITE_EVERY_S)
        await self.write()

    async def write(self) -> None:
        """Write down the requests that have ended."""
        usages, self._usages = self._usages, []
        if usages:
            await asyncio.to_thread(self._state.add_usage, usages)

    async def close(self) -> None:
        """The server ends: cut everything, lose no row."""
        for request in list(self._open):
            request.cut()
        for task in (self._watching, self._writing):
            if task is not None:
                task.cancel()
        await self.write()
