"""Keeps endpoints alive: starts their replicas through node agents, watches them, replaces those that die."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.names import check_name
from jupyter_llmcloud.errors import NameTaken, NotFound, UsageError
from jupyter_llmcloud.server.endpoints.controller import ACTIVE_STATES, LiveEndpoint
from jupyter_llmcloud.server.endpoints.model_folder import resolve_target
from jupyter_llmcloud.storage.server_state import StoredEndpoint

if TYPE_CHECKING:
    from jupyter_llmcloud.server.context import ServerContext

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_REPLICAS = 64


class EndpointKeeper:
    """All endpoints of one server, by name."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._endpoints: dict[str, LiveEndpoint] = {}

    async def start(self) -> None:
        """Take up the endpoints that the database knows; those that lived find their replicas again."""
        for stored in self._context.state.endpoints(self._context.server_id):
            endpoint = LiveEndpoint(stored, self._context)
            self._endpoints.setdefault(stored.name, endpoint)
            if stored.state in ACTIVE_STATES:
                endpoint.open(inherited=True)

    async def create(
        self,
        target: str,
        name: str | None = None,
        num_replicas: int = 1,
        dtype: str = "auto",
        cluster: str | None = None,
    ) -> LiveEndpoint:
        """Begin to serve a target. Everything that can be refused is refused before anything starts."""
        _check_options(num_replicas, dtype)
        folder = await asyncio.to_thread(resolve_target, target, self._context.runs, self._context.root_dir)
        name = check_name(name or folder.name, "endpoint")
        living = self._endpoints.get(name)
        if living is not None and living.is_active:
            raise NameTaken(
                f"endpoint {name!r} serves {living.stored.target!r} already: choose another --name, "
                f"or stop it first (%endpoints stop {name})."
            )
        stored = StoredEndpoint(
            name=name, model=str(folder.path), target=target, revision=folder.revision, created=time.time(),
            num_replicas=num_replicas, dtype=dtype, cluster=cluster,
        )  # fmt: skip
        endpoint = LiveEndpoint(stored, self._context)
        self._endpoints[name] = endpoint
        endpoint.open()
        return endpoint

    def get(self, name: str) -> LiveEndpoint:
        """The endpoint with this name; raises NotFound."""
        if (endpoint := self._endpoints.get(name)) is None:
            known = ", ".join(sorted(self._endpoints)[:8])
            raise NotFound(
                f"there is no endpoint {name!r}. " + (f"There is: {known}." if known else "There are none yet.")
            )
        return endpoint

    def list(self) -> list[LiveEndpoint]:
        """Every endpoint, the newest first."""
        return sorted(self._endpoints.values(), key=lambda endpoint: endpoint.stored.created, reverse=True)

    async def stop(self, name: str) -> dict[str, Any]:
        """End an endpoint; one that has ended already is forgotten."""
        endpoint = self.get(name)
        if endpoint.is_active:
            await endpoint.stop()
        else:
            del self._endpoints[name]
            self._context.state.delete_endpoint(self._context.server_id, name)
        return endpoint.describe()

    async def close(self, stop: bool) -> None:
        """The server ends; `stop` ends the replicas too."""
        active = [endpoint for endpoint in self._endpoints.values() if endpoint.is_active]
        await asyncio.gather(*(endpoint.stop() if stop else endpoint.detach() for endpoint in active))


def _check_options(num_replicas: int, dtype: str) -> None:
    if not 1 <= num_replicas <= MAX_REPLICAS:
        raise UsageError(f"replicas {num_replicas} is not possible: 1 to {MAX_REPLICAS}.")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known: choose one of {', '.join(DTYPES)}.")
