"""The endpoints of a server, by name."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.names import check_name
from jupyter_llmcloud.core.serving.endpoint_plan import Revision
from jupyter_llmcloud.errors import NameTaken, NotFound, UsageError
from jupyter_llmcloud.server.endpoints.controller import ACTIVE_STATES, EndpointController
from jupyter_llmcloud.server.endpoints.model_folder import resolve_target
from jupyter_llmcloud.storage.server_state import StoredEndpoint

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.endpoints.records import EndpointRecords
    from jupyter_llmcloud.server.endpoints.replica_host import ReplicaHost
    from jupyter_llmcloud.storage.runs import RunStore

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_REPLICAS = 64
MAX_REVISIONS = 20  # that are kept of one endpoint


class EndpointRegistry:
    """All endpoints of one server."""

    def __init__(
        self, records: EndpointRecords, host: ReplicaHost, runs: RunStore, root_dir: Path | None, log: Logger
    ) -> None:
        self._records = records
        self._host = host
        self._runs = runs
        self._root_dir = root_dir
        self._log = log
        self._endpoints: dict[str, EndpointController] = {}

    async def start(self) -> None:
        """Take up the endpoints that the database knows; those that lived find their replicas again."""
        for stored in self._records.load():
            if stored.name not in self._endpoints:
                endpoint = self._add(stored)
                if stored.state in ACTIVE_STATES:
                    endpoint.open(inherited=True)

    def _add(self, stored: StoredEndpoint) -> EndpointController:
        endpoint = EndpointController(stored, self._host, self._records, self._log)
        self._endpoints[stored.name] = endpoint
        return endpoint

    async def create(
        self,
        target: str,
        name: str | None = None,
        num_replicas: int = 1,
        dtype: str = "auto",
        cluster: str | None = None,
        *,
        base_model: str | None = None,
        max_model_len: int | None = None,
        max_concurrent: int = 32,
        threads: int | None = None,
        engine: str = "auto",
    ) -> EndpointController:
        """Begin to serve a target. Everything that can be refused is refused before anything starts."""
        _check_options(num_replicas, dtype)
        folder = await asyncio.to_thread(resolve_target, target, self._runs, self._root_dir, base_model)
        name = check_name(name or folder.name, "endpoint")
        known = self._endpoints.get(name)
        if known is not None and known.is_active:
            raise NameTaken(
                f"endpoint {name!r} serves {known.stored.current.target!r} already: choose another --name, "
                f"or stop it first (%endpoints stop {name})."
            )
        before = known.stored.revisions if known is not None else []
        revision = Revision(
            before[-1].number + 1 if before else 1, str(folder.path), target, folder.revision, dtype, num_replicas,
            base_model=folder.base_model, max_model_len=max_model_len, max_concurrent=max_concurrent, threads=threads,
            engine=engine,
        )  # fmt: skip
        retired = [dataclasses.replace(earlier, num_replicas=0, weight=0) for earlier in before]
        revisions = [*retired, revision][-MAX_REVISIONS:]
        endpoint = self._add(StoredEndpoint(name, revisions, created=time.time(), cluster=cluster))
        endpoint.open()
        return endpoint

    def get(self, name: str) -> EndpointController:
        """The endpoint with this name; raises NotFound."""
        if (endpoint := self._endpoints.get(name)) is None:
            known = ", ".join(sorted(self._endpoints)[:8])
            raise NotFound(
                f"there is no endpoint {name!r}. " + (f"There is: {known}." if known else "There are none yet.")
            )
        return endpoint

    def list(self) -> list[EndpointController]:
        """Every endpoint, the newest first."""
        return sorted(self._endpoints.values(), key=lambda endpoint: endpoint.stored.created, reverse=True)

    async def stop(self, name: str) -> dict[str, Any]:
        """End an endpoint; one that has ended already is forgotten."""
        endpoint = self.get(name)
        if endpoint.is_active:
            await endpoint.stop()
        elif self._endpoints.pop(name, None) is not None:
            self._records.delete(name)
        return endpoint.describe()

    async def close(self, stop: bool) -> None:
        """The server ends; `stop` ends the replicas too."""
        endpoints = list(self._endpoints.values())
        await asyncio.gather(*(e.stop() if stop else e.detach() for e in endpoints if e.is_active))
        await asyncio.gather(*(endpoint.ended() for endpoint in endpoints if not endpoint.is_active))
        self._records.close()


def _check_options(num_replicas: int, dtype: str) -> None:
    if not 1 <= num_replicas <= MAX_REPLICAS:
        raise UsageError(f"replicas {num_replicas} is not possible: 1 to {MAX_REPLICAS}.")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known: choose one of {', '.join(DTYPES)}.")
