"""Is there a server, and is it ours?"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud import config
from jupyter_llmcloud.protocol.http.status import Live, Ready, Status
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.operation import EVERYBODY, operation

if TYPE_CHECKING:
    from jupyter_llmcloud.server.cluster_access import Identity


def package_version() -> str:
    """Of jupyter-llmcloud, as installed."""
    try:
        return version("jupyter-llmcloud")
    except PackageNotFoundError:
        return "0"


class StatusHandler(LLMCloudHandler):
    """What this server is."""

    def initialize(self, identity: Identity, **shared: Any) -> None:  # type: ignore[override]
        """`identity` tells which server this is."""
        super().initialize(**shared)
        self.identity = identity

    @operation("read", Status)
    async def get(self) -> Status:
        """What this server is; answered by every server with our extension."""
        return Status(
            version=package_version(),
            pid=os.getpid(),
            headless=self.identity.headless,
            root=str(config.root()),
        )


class LivezHandler(LLMCloudHandler):
    """For probes, which have no token: says nothing but that the loop turns."""

    @operation(EVERYBODY, Live)
    async def get(self) -> Live:
        """Whether the server answers."""
        return Live()


class ReadyzHandler(LLMCloudHandler):
    """For probes, which have no token: ready when the saved endpoints are known again."""

    @operation(EVERYBODY, Ready)
    async def get(self) -> Ready:
        """Answered when the saved endpoints are known again."""
        await self.started()
        return Ready()
