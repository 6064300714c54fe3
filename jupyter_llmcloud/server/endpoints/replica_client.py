"""One replica as the server sees it: how it is reached, what it says of itself, who is asking it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from jupyter_llmcloud.core.serving.endpoint.routing import CircuitBreaker, ReplicaLoad, RequestShape
from jupyter_llmcloud.server.endpoints.replica_connection import ReplicaConnections
from jupyter_llmcloud.storage.server_state import StoredReplica

ANY_REQUEST = RequestShape()
RELOAD_TIMEOUT_S = 600.0
MAX_CONCURRENT = 32
USAGE_TIMEOUT_S = 3.0
ASK_TIMEOUT_S = 10.0


class ReplicaLost(Exception):
    """A replica was given up or stopped while it was asked; the text says why."""


class ReplicaRefusal(Exception):
    """A replica does not do what it was asked, and goes on as it was. `status` as of HTTP."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Health:
    """What `/readyz` said: ready, loading, draining, failed, silent (nothing in time) or unreachable."""

    state: str
    reason: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _CallInProgress:
    """Somebody is asking the replica."""

    task: asyncio.Task[Any]
    num_cancelled: int
    reason: str | None = None


class ReplicaClient:
    """A process that serves a model on a unix socket, behind its own bearer token.

    Attributes:
        number: names it within its endpoint.
        stored: what is kept of it.
        load: what it answers now, as routing sees it.
        weight: of its revision, in percent of the requests; 0: it gets none.
        breaker: keeps requests away while it fails them.
        reported: what it said of itself when it was ready last: its engine, threads, memory.
        adapters: that it was asked to answer for, by their names: their folders.
    """

    def __init__(self, number: int, stored: StoredReplica) -> None:
        self.number = number
        self.stored = stored
        self.load = ReplicaLoad(capacity=MAX_CONCURRENT)
        self.weight = 0
        self.breaker = CircuitBreaker()
        self.reported: dict[str, Any] = {}
        self.adapters: dict[str, str] = {}
        self._session: aiohttp.ClientSession | None = None
        self._connections: ReplicaConnections | None = None
        self._uses: set[_CallInProgress] = set()
        self._lost: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_in_flight(self) -> int:
        """How many requests it answers now."""
        return self.load.num_in_flight

    @property
    def id(self) -> str:
        return self.stored.id

    @property
    def pid(self) -> int:
        return self.stored.pid

    def __str__(self) -> str:
        return f"replica {self.id} (pid {self.pid})" if self.pid else f"replica {self.id}"

    @property
    def connections(self) -> ReplicaConnections:
        """Those by which somebody's requests go to it."""
        if self._connections is None:
            headers = {"Authorization": f"Bearer {self.stored.token}"}
            self._connections = ReplicaConnections(self.stored.socket, headers)
        return self._connections

    @property
    def session(self) -> aiohttp.ClientSession:
        """A client of it, for what the server itself wants to know."""
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                "http://replica",
                connector=aiohttp.UnixConnector(self.stored.socket, limit=0, keepalive_timeout=60),
                headers={"Authorization": f"Bearer {self.stored.token}"},
                timeout=aiohttp.ClientTimeout(total=None, connect=5),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                cookie_jar=aiohttp.DummyCookieJar(),
                raise_for_status=False,
            )
        return self._session

    # --- what it says of itself ---

    async def health(self, timeout_s: float) -> Health:
        """Ask it how it is."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self.session.get("/readyz", timeout=timeout) as response:
                values = await response.json(content_type=None) if response.status in (200, 500, 503) else {}
        except TimeoutError:  # before OSError, of which it is a kind
            return Health("silent", f"no answer to /readyz within {timeout_s:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Health("unreachable", str(error) or type(error).__name__)
        if response.status == 401:
            return Health("unreachable", "another process answers on its socket")
        values = values if isinstance(values, dict) else {}
        state = {200: "ready", 503: str(values.get("state", "loading")), 500: "failed"}.get(response.status)
        return Health(state or "unreachable", str(values.get("reason", "")), values)

    async def change(self, path: str, body: dict[str, Any], timeout_s: float = RELOAD_TIMEOUT_S) -> dict[str, Any]:
        """Have it change what it serves: other weights, an adapter more or less.

        Raises ReplicaRefusal when it does not, ReplicaLost when it does not answer.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            with self.use():
                async with self.session.post(path, json=body, timeout=timeout) as response:
                    told = await response.json(content_type=None) if response.status != 404 else {}
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            raise ReplicaLost(f"{self} does not answer {path}: {error or type(error).__name__}") from None
        told = told if isinstance(told, dict) else {}
        if response.status != 200:
            message = told.get("error", {}).get("message") if isinstance(told.get("error"), dict) else None
            raise ReplicaRefusal(str(message or f"it answered {path} with status {response.status}"), response.status)
        return told

    async def ask(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """The status and the body of a short answer. Raises ReplicaLost when it does not answer."""
        timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)
        try:
            with self.use():
                async with self.session.request(method, path, headers=headers, timeout=timeout) as response:
                    return response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise ReplicaLost(f"{self} does not answer {path[:200]}: {error or type(error).__name__}") from None

    async def usage(self, request_id: str) -> dict[str, int] | None:
        """What a request has cost, once it has ended there: its prompt and completion tokens; None when unknown."""
        if self._lost is not None:
            return None
        timeout = aiohttp.ClientTimeout(total=USAGE_TIMEOUT_S)
        try:
            async with self.session.get(f"/usage/{request_id}", timeout=timeout) as response:
                counted = await response.json() if response.status == 200 else None
        except (aiohttp.ClientError, OSError, ValueError):
            return None
        return counted if isinstance(counted, dict) else None

    # --- who asks it ---

    def enter(self, shape: RequestShape = ANY_REQUEST) -> ReplicaClient:
        """A request takes a place."""
        self.load.enter(shape)
        self.breaker.entered()
        self._idle.clear()
        return self

    def leave(self, shape: RequestShape = ANY_REQUEST) -> None:
        """A request gives its place back."""
        self.load.leave(shape)
        if not self.load.num_in_flight:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Until no request has a place."""
        await self._idle.wait()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Ask the replica inside: ReplicaLost is raised there as soon as the replica is given up.

        Closing its connections would not do: aiohttp lets a reader that waits for the next chunk wait for ever.
        """
        if self._lost is not None:
            raise ReplicaLost(self._lost)
        task = asyncio.current_task()
        assert task is not None
        use = _CallInProgress(task, task.cancelling())
        self._uses.add(use)
        try:
            yield
        except asyncio.CancelledError:
            if use.reason is None or task.uncancel() > use.num_cancelled:
                raise
            raise ReplicaLost(use.reason) from None
        finally:
            self._uses.discard(use)

    def give_up(self, reason: str) -> None:
        """Nobody shall wait for it any longer."""
        self._lost = reason
        for use in self._uses:
            if use.reason is None:
                use.reason = reason
                use.task.cancel()

    async def close(self) -> None:
        """Close the connections to it."""
        if self._connections is not None:
            self._connections.close()
            self._connections = None
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()
