"""Keeps requests and their answers, for endpoints that were started to do so."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from typing import TYPE_CHECKING

from jupyter_llmcloud.storage.serving.feedback import FeedbackStore, KeptRequest

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.gateway.proxy import GatewayRequest


class Keeper:
    """Writes what is kept, beside the answers."""

    def __init__(self, store: FeedbackStore, log: Logger) -> None:
        self.store = store
        self._log = log
        self._writing: set[asyncio.Task[None]] = set()

    def keep(self, asked: GatewayRequest, endpoint: EndpointController, answer: bytes) -> None:
        """Write it soon."""
        revision = endpoint.stored.current.fingerprint
        kept = KeptRequest(asked.request_id, time.time(), endpoint.name, revision, asked.route, asked.body, answer)
        task = asyncio.ensure_future(self._write(kept))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, request: KeptRequest) -> None:
        try:
            await asyncio.to_thread(self.store.keep, request)
        except sqlite3.Error as error:
            self._log.error("request %s is not kept: %s", request.request_id, error)

    async def written(self) -> None:
        """Wait until everything is."""
        if self._writing:
            await asyncio.wait(self._writing)

    async def close(self) -> None:
        """The server ends."""
        await self.written()
        self.store.close()
