"""Endpoints: started, watched, stopped."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_server.utils import url_path_join

from jupyter_llmcloud.core.spec import EndpointSpec, Interface
from jupyter_llmcloud.protocol.http.endpoints import (
    Endpoint,
    EndpointLogs,
    EndpointLogsQuery,
    EndpointQuery,
    EndpointRates,
    Endpoints,
    Replica,
    ReplicaLog,
    StartEndpoint,
)
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.operation import operation

if TYPE_CHECKING:
    from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry


def as_endpoint(described: dict[str, Any], url: str = "") -> Endpoint:
    """An endpoint as `EndpointController.describe` tells of it, with the URL under which a client reaches it."""
    replicas = [Replica(**row) for row in described["replicas"]]
    rates = EndpointRates(**described["rates"]) if "rates" in described else None
    return Endpoint(**{**described, "replicas": replicas, "rates": rates, "url": url})


class _EndpointHandler(LLMCloudHandler):
    def initialize(self, endpoints: EndpointRegistry, **shared: Any) -> None:  # type: ignore[override]
        super().initialize(**shared)
        self.endpoints = endpoints

    def told(self, described: dict[str, Any]) -> Endpoint:
        """With the URL under which this client reached the server."""
        origin = f"{self.request.protocol}://{self.request.host}"
        return as_endpoint(described, origin + url_path_join(self.base_url, "llmcloud/v1"))


class EndpointsHandler(_EndpointHandler):
    """All endpoints."""

    @operation("read", Endpoints)
    async def get(self) -> Endpoints:
        """List the endpoints, the newest first."""
        await self.started()
        return Endpoints(endpoints=[self.told(endpoint.describe()) for endpoint in self.endpoints.list()])

    @operation("execute", Endpoint, 201, body=StartEndpoint)
    async def post(self, body: StartEndpoint) -> Endpoint:
        """Serve a run's model or a folder. Answers at once; the endpoint is starting then."""
        await self.started()
        options = body.given()
        target = options.pop("target")
        spec = EndpointSpec.make(options, Interface.REST)
        work = self.endpoints.create(
            target, spec.name, spec.replicas, spec.dtype, spec.cluster,
            base_model=spec.base_model, max_model_len=spec.max_model_len, max_concurrent=spec.max_concurrent,
            threads=spec.threads, engine=spec.engine,
        )  # fmt: skip
        endpoint = await self.carry_out("endpoint.start", (spec.name or target)[:128], work, target=target)
        return self.told(endpoint.describe())


class EndpointHandler(_EndpointHandler):
    """One endpoint."""

    @operation("read", Endpoint, query=EndpointQuery)
    async def get(self, name: str, query: EndpointQuery) -> Endpoint:
        """Tell of an endpoint; `wait_s` waits until it is not starting any more."""
        await self.started()
        endpoint = self.endpoints.get(name)
        if query.wait_s:
            await endpoint.wait("starting", query.wait_s)
        return self.told(endpoint.describe())

    @operation("execute", Endpoint)
    async def delete(self, name: str) -> Endpoint:
        """Stop an endpoint; one that is stopped already is forgotten."""
        await self.started()
        return self.told(await self.carry_out("endpoint.stop", name, self.endpoints.stop(name)))


class EndpointLogsHandler(_EndpointHandler):
    """What the replicas of an endpoint printed."""

    @operation("read", EndpointLogs, query=EndpointLogsQuery)
    async def get(self, name: str, query: EndpointLogsQuery) -> EndpointLogs:
        """The newest lines of each replica of an endpoint."""
        await self.started()
        paths = self.endpoints.get(name).logs()
        texts = await asyncio.gather(*(asyncio.to_thread(last_lines, Path(path), query.limit) for path in paths))
        return EndpointLogs(logs=[ReplicaLog(path=path, text=text) for path, text in zip(paths, texts, strict=True)])


def last_lines(path: Path, limit: int) -> str:
    """The end of a text file; empty when it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, maxlen=limit))
    except OSError:
        return ""
