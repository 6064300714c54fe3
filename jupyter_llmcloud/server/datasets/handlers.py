"""Preparations of data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tornado import web

from jupyter_llmcloud.protocol.http.data.preparations import (
    DataPreparation,
    DataPreparations,
    PreparationQuery,
    StartPreparation,
)
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.operation import operation

if TYPE_CHECKING:
    from jupyter_llmcloud.server.datasets.preparations import Preparations

MAX_CODE = 128 << 20  # a tokenizer's definition can have tens of megabytes


class PreparationHandlerBase(LLMCloudHandler):
    """What these routes have in common."""

    def initialize(self, preparations: Preparations, **shared: Any) -> None:  # type: ignore[override]
        """`preparations`: of this server."""
        super().initialize(**shared)
        self.preparations = preparations

    def content(self) -> bytes:
        """The body, which may hold a tokenizer."""
        if len(self.request.body) > MAX_CODE:
            raise web.HTTPError(413)
        return self.request.body


class PreparationsHandler(PreparationHandlerBase):
    """All preparations."""

    @operation("read", DataPreparations)
    async def get(self) -> DataPreparations:
        """List the preparations of this server, the newest first."""
        return DataPreparations(preparations=self.preparations.list())

    @operation("execute", DataPreparation, 201, body=StartPreparation)
    async def post(self, body: StartPreparation) -> DataPreparation:
        """Begin to prepare a source, which has been looked at when this answers; what is there is gone on with."""
        return await self.preparations.start(body, self.actor)


class PreparationHandler(PreparationHandlerBase):
    """One preparation."""

    @operation("read", DataPreparation, query=PreparationQuery)
    async def get(self, name: str, query: PreparationQuery) -> DataPreparation:
        """How far a preparation is."""
        return await self.preparations.wait(name, query.seen, query.wait_s)


class PreparationStopHandler(PreparationHandlerBase):
    """The end of a preparation."""

    @operation("execute", DataPreparation)
    async def post(self, name: str) -> DataPreparation:
        """Stop a preparation; finished shards are kept, and the same request goes on from there."""
        return await self.preparations.stop(name)
