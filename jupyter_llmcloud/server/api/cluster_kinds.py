"""What a form for a new cluster asks for, and what a starting cluster prints."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from typing import Any

import msgspec

from jupyter_llmcloud.protocol.http.clusters import ClusterKind, ClusterKinds, ClusterLog
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.clusters import ClusterHandlerBase
from jupyter_llmcloud.server.api.endpoints import last_lines
from jupyter_llmcloud.server.api.operation import operation

LOG_LINES = 400


class ClusterKindsHandler(LLMCloudHandler):
    """Kinds of clusters."""

    @operation("read", ClusterKinds)
    async def get(self) -> ClusterKinds:
        """List the kinds of clusters that can be started here, each with its options and their defaults."""
        rows = await asyncio.to_thread(_describe)
        kinds = [msgspec.convert(row, ClusterKind) for row in rows]
        return ClusterKinds(kinds=kinds, has_dashboard_proxy=self._has_proxy())

    def _has_proxy(self) -> bool:
        manager = getattr(self.serverapp, "extension_manager", None)
        package = manager.extensions.get("jupyter_server_proxy") if manager is not None else None
        return package is not None and package.enabled


def _describe() -> list[dict[str, Any]]:
    # distributed takes most of a second to import: with the first question, and not on the loop.
    module = importlib.import_module("jupyter_llmcloud.cluster.kinds.describe")
    describe: Callable[[], list[dict[str, Any]]] = module.describe_kinds
    return describe()


class ClusterLogHandler(ClusterHandlerBase):
    """What a cluster prints."""

    @operation("read", ClusterLog)
    async def get(self, name: str) -> ClusterLog:
        """The newest lines of a cluster's host process, also while it is starting."""
        pool = await self.clusters.pool()
        record, path = pool.log(name)
        text = await asyncio.to_thread(last_lines, path, LOG_LINES)
        return ClusterLog(name=record.name, state=record.state, text=text)
