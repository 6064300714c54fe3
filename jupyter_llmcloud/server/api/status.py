"""Is there a server, and is it ours?"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from jupyter_server.auth.decorator import allow_unauthenticated

from jupyter_llmcloud import config
from jupyter_llmcloud.server.api.base import LLMCloudHandler, access

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

    @access("read")
    async def get(self) -> None:
        """Answered by every server with our extension."""
        headless = self.identity.headless
        self.answer(
            {
                "version": package_version(),
                "pid": os.getpid(),
                "headless": headless,
                "root": str(config.root()),
            }
        )


class LivezHandler(LLMCloudHandler):
    """For probes, which have no token: says nothing but that the loop turns."""

    @allow_unauthenticated
    async def get(self) -> None:
        """Alive."""
        self.answer({"status": "ok"})


class ReadyzHandler(LLMCloudHandler):
    """For probes, which have no token: ready when the saved endpoints are known again."""

    @allow_unauthenticated
    async def get(self) -> None:
        """Ready."""
        await self.started()
        self.answer({"status": "ready"})
