"""The Jupyter server extension."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_server.extension.application import ExtensionApp
from traitlets import Float, List, Unicode, default

from jupyter_llmcloud import config
from jupyter_llmcloud.server.answers.copied_answers import CACHE
from jupyter_llmcloud.server.answers.response_cache import ResponseCache
from jupyter_llmcloud.server.api.cross_origin import ORIGINS, check_origins
from jupyter_llmcloud.server.cluster_access import Identity
from jupyter_llmcloud.server.context import ServerContext
from jupyter_llmcloud.server.gateway.keyed.router import KEYED
from jupyter_llmcloud.server.gateway.open_requests import KEEP_S
from jupyter_llmcloud.server.routes import SETTING, handlers, keyed_router

if TYPE_CHECKING:
    from jupyter_server.serverapp import ServerApp


class LLMCloudExtension(ExtensionApp):
    """Clusters, runs, endpoints and keys below `/llmcloud` of a Jupyter server."""

    name = "jupyter_llmcloud"
    load_other_extensions = True
    identity = Identity()
    allow_origins: List[str] = List(
        Unicode(),
        help="Origins (https://example.org) whose pages may ask llmcloud's routes and read the answers, by a key or a "
        "token; * for any. None unless named. Jupyter's own allow_origin counts too where it names one origin.",
    ).tag(config=True)
    context: ServerContext | None = None
    cache_url = Unicode(
        config=True,
        help="A Redis or Valkey (redis://, rediss://, unix://) in which answers are kept that the same request would "
        "get again: greedy or with a seed, of the same key, model and revision. Empty: none is kept.",
    )
    keep_usage_days = Float(
        KEEP_S / 86400,
        config=True,
        help="How many days a request to an endpoint stays in the table of usage; inf: for ever. What each key has "
        "used on each day stays in any case.",
    )
    cache_ttl_s = Float(3600.0, config=True, help="How many seconds an answer is kept there.")

    @default("cache_url")
    def _cache_url(self) -> str:
        return os.environ.get(config.ENV_CACHE_URL, "")

    def initialize_settings(self) -> None:
        """Make what the handlers share; nothing is started yet."""
        assert self.serverapp is not None
        root_dir = Path(str(self.serverapp.root_dir))
        self.context = ServerContext(self.log, self.serverapp.event_logger, self.identity, root_dir)
        self.context.keep_usage(self.keep_usage_days)
        self.settings[SETTING] = self.context
        if self.cache_url:
            self.settings[CACHE] = ResponseCache(self.cache_url, self.cache_ttl_s, self.log)
        self.settings[ORIGINS] = check_origins(self.allow_origins)

    def initialize_handlers(self) -> None:
        """Add our routes."""
        assert self.context is not None
        self.handlers.extend(handlers(self.context))
        assert self.serverapp is not None
        keyed_router(self.context, self.serverapp.web_app).add()

    async def _start_jupyter_server_extension(self, serverapp: ServerApp) -> None:
        assert self.context is not None
        await self.context.started()

    async def stop_extension(self) -> None:
        """The server ends."""
        if self.context is not None:
            try:
                await self.context.close()
                if self.serverapp is not None and KEYED in self.serverapp.web_app.settings:
                    self.serverapp.web_app.settings[KEYED].close()
                if CACHE in self.settings:
                    await self.settings[CACHE].close()
            except Exception:  # Jupyter would not end then, and serve on without us
                self.log.exception("jupyter-llmcloud did not close")


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    return [{"module": "jupyter_llmcloud.server.extension", "app": LLMCloudExtension}]
