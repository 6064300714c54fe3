"""The OpenAPI document, asked of a server."""

from __future__ import annotations

from typing import Any

import msgspec

from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.operation import operation
from jupyter_llmcloud.server.openapi.document import JSON, Routes, document


class OpenApiHandler(LLMCloudHandler):
    """What this server can be asked."""

    def initialize(self, routes: Routes, **shared: Any) -> None:  # type: ignore[override]
        """`routes` are those of this server."""
        super().initialize(**shared)
        self.routes = routes

    @operation("read", JSON)
    async def get(self) -> None:
        """The OpenAPI document of this server."""
        self.finish(msgspec.json.encode(document(self.routes, self.base_url)))
