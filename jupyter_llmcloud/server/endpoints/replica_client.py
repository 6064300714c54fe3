"""One replica as the server sees it: how it is reached, what it says of itself, how many requests it has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import aiohttp

PROBE_TIMEOUT_S = 10.0
MAX_CONCURRENT = 32


@dataclass(frozen=True)
class Health:
    """What `/readyz` said: ready, loading, failed, or unreachable."""

    state: str
    reason: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class ReplicaClient:
    """A process that serves a model on a unix socket, behind its own bearer token."""

    id: str
    agent: str
    token: str
    socket: str = ""
    log: str = ""
    pid: int = 0
    state: str = "starting"
    max_concurrent: int = MAX_CONCURRENT
    num_in_flight: int = 0
    _session: aiohttp.ClientSession | None = field(default=None, repr=False)

    @classmethod
    def from_stored(cls, stored: dict[str, Any]) -> ReplicaClient:
        """The replica that a row of the database tells of."""
        return cls(**{key: stored[key] for key in ("id", "agent", "token", "socket", "log", "pid")})

    def to_stored(self) -> dict[str, Any]:
        """What the database keeps; with this a later server finds it again."""
        return {key: getattr(self, key) for key in ("id", "agent", "token", "socket", "log", "pid")}

    def describe(self) -> dict[str, Any]:
        """What anybody may know."""
        return {"id": self.id, "pid": self.pid, "state": self.state, "in_flight": self.num_in_flight}

    @property
    def session(self) -> aiohttp.ClientSession:
        """The pool of connections to it."""
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                "http://replica",
                connector=aiohttp.UnixConnector(self.socket, limit=0, keepalive_timeout=60),
                headers={"Authorization": f"Bearer {self.token}"},
                timeout=aiohttp.ClientTimeout(total=None, connect=5),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                raise_for_status=False,
            )
        return self._session

    async def health(self) -> Health:
        """Ask it how it is."""
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        try:
            async with self.session.get("/readyz", timeout=timeout) as response:
                values = await response.json(content_type=None) if response.status in (200, 500, 503) else {}
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Health("unreachable", str(error))
        except TimeoutError:
            return Health("silent", f"no answer to /readyz within {PROBE_TIMEOUT_S:.0f} s")
        if response.status == 401:
            return Health("unreachable", "another process answers on its socket")
        state = {200: "ready", 503: "loading", 500: "failed"}.get(response.status, "unreachable")
        values = values if isinstance(values, dict) else {}
        return Health(state, str(values.get("reason", "")), values)

    async def close(self) -> None:
        """Close the connections to it."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()
