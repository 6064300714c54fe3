"""Pages of other origins (CORS): they may ask, and read the answer, only where the configuration names their origin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jupyter_server.auth.decorator import allow_unauthenticated
from jupyter_server.base.handlers import JupyterHandler

from jupyter_llmcloud.errors import UsageError

ORIGINS = "jupyter_llmcloud_allow_origins"  # in the settings of the web application: a frozenset
ANY = "*"
METHODS = "GET, POST, DELETE, OPTIONS"
# A wildcard names every header but Authorization; it counts as one as long as no credentials are allowed.
HEADERS = "Authorization, *"
EXPOSED = ", ".join(
    [
        "X-Request-Id", "Retry-After", "retry-after-ms",
        *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
    ]
)  # fmt: skip
PREFLIGHT_AGE_S = 600


def check_origins(origins: Iterable[str]) -> frozenset[str]:
    """The origins, as browsers write them; raises UsageError for a text that is none."""
    found = set()
    for origin in origins:
        scheme, _, host = origin.partition("://")
        if origin != ANY and not (scheme and host and not set(host) & set("/*?#@ ")):
            raise UsageError(
                f"allow_origins: {origin!r} is no origin: write scheme://host or scheme://host:port, or * for any."
            )
        found.add(origin.lower())
    return frozenset(found)


class NamedOrigins(JupyterHandler):
    """Answers name only origins that `LLMCloudExtension.allow_origins` or Jupyter's `allow_origin` names.

    Jupyter's own handlers name any origin that comes with a token, and in a preflight any at all; and what they name is
    lost when an answer becomes an error.
    """

    def set_default_headers(self) -> None:
        """Of every answer, errors too."""
        super().set_default_headers()
        if (named := self._named_origin()) is not None:
            self.set_header("Access-Control-Allow-Origin", named)
            self.set_header("Access-Control-Expose-Headers", EXPOSED)
        if "Origin" in self.request.headers:
            self.add_header("Vary", "Origin")

    def set_cors_headers(self) -> None:
        """They are set already."""

    def _named_origin(self) -> str | None:
        """The origin that may read the answer; `*` where all may."""
        origin = self.request.headers.get("Origin", "").lower()
        origins: frozenset[str] = self.settings.get(ORIGINS, frozenset())
        if not origin:
            return None
        if origin in origins or origin == self.allow_origin.lower():
            return self.request.headers["Origin"]
        return ANY if ANY in origins else None

    def check_origin(self, origin_to_satisfy_tornado: str = "") -> bool:
        """May this page ask? Any may that comes from here, or whose origin is named; and so may who is no page."""
        return self._named_origin() is not None or super().check_origin(origin_to_satisfy_tornado)

    @allow_unauthenticated
    def options(self, *args: Any, **kwargs: Any) -> None:
        """Answer a preflight: what follows may be asked, when the origin is named."""
        if self._named_origin() is not None:
            self.set_header("Access-Control-Allow-Methods", METHODS)
            self.set_header("Access-Control-Allow-Headers", HEADERS)
            self.set_header("Access-Control-Max-Age", str(PREFLIGHT_AGE_S))
        self.set_status(204)
        self.finish()
