"""Endpoints: started, watched, stopped."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_server.utils import url_path_join

from jupyter_llmcloud.core.names import parse_replicas
from jupyter_llmcloud.core.serving.models.cell_source import CellSource, check_source
from jupyter_llmcloud.core.spec import EndpointSpec, Interface
from jupyter_llmcloud.protocol.http.endpoints import (
    AddAdapter,
    Endpoint,
    EndpointLogs,
    EndpointLogsQuery,
    EndpointQuery,
    EndpointRates,
    Endpoints,
    Replica,
    ReplicaLog,
    ScaleEndpoint,
    ServedRevision,
    ServedSource,
    ShadowComparison,
    ShadowEndpoint,
    SplitEndpoint,
    StartEndpoint,
    UpdateEndpoint,
)
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.operation import NoFields, operation
from jupyter_llmcloud.server.endpoints.model_folder import ModelFolder, of_code
from jupyter_llmcloud.storage.models import served_code

if TYPE_CHECKING:
    from tornado.httputil import HTTPServerRequest

    from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry


def as_endpoint(described: dict[str, Any], url: str = "") -> Endpoint:
    """An endpoint as `EndpointController.describe` tells of it, with the URL under which a client reaches it."""
    replicas = [Replica(**row) for row in described["replicas"]]
    rates = EndpointRates(**described["rates"]) if "rates" in described else None
    revisions = [_as_revision(row) for row in described["revisions"]]
    return Endpoint(**{**described, "replicas": replicas, "revisions": revisions, "rates": rates, "url": url})


def _as_revision(row: dict[str, Any]) -> ServedRevision:
    compared = row.get("comparison")
    return ServedRevision(**{**row, "comparison": ShadowComparison(**compared) if compared else None})


def gateway_url(request: HTTPServerRequest, base_url: str) -> str:
    """The base URL of the models' API, under which whoever sent this request reaches the server."""
    return f"{request.protocol}://{request.host}" + url_path_join(base_url, "llmcloud/v1")


class _EndpointHandler(LLMCloudHandler):
    def initialize(self, endpoints: EndpointRegistry, **shared: Any) -> None:  # type: ignore[override]
        super().initialize(**shared)
        self.endpoints = endpoints

    def told(self, described: dict[str, Any]) -> Endpoint:
        """With the URL under which this client reached the server."""
        return as_endpoint(described, gateway_url(self.request, self.base_url))


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
        target, source = options.pop("target"), options.pop("source", None)
        reuse = options.pop("reuse", False)
        spec = EndpointSpec.make(options, Interface.REST)
        code = await asyncio.to_thread(_kept, source, spec.name or target) if source is not None else None
        work = self.endpoints.create(target, spec, reuse, code)
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


class EndpointScaleHandler(_EndpointHandler):
    """How many replicas an endpoint has."""

    @operation("execute", Endpoint, body=ScaleEndpoint)
    async def post(self, name: str, body: ScaleEndpoint) -> Endpoint:
        """Have another number of replicas, or bounds between which it follows the load."""
        await self.started()
        replicas = parse_replicas(str(body.replicas))
        work = self.endpoints.scale(name, replicas)
        return self.told((await self.carry_out("endpoint.scale", name, work, replicas=replicas)).describe())


class EndpointUpdateHandler(_EndpointHandler):
    """Which model an endpoint serves."""

    @operation("execute", Endpoint, body=UpdateEndpoint)
    async def post(self, name: str, body: UpdateEndpoint) -> Endpoint:
        """Serve another model under the same name, without an outage; with `canary` to a part of the requests only."""
        await self.started()
        work = self.endpoints.update(name, body.target, body.canary)
        endpoint = await self.carry_out("endpoint.update", name, work, target=body.target, canary=body.canary)
        return self.told(endpoint.describe())


class EndpointSplitHandler(_EndpointHandler):
    """How the requests to an endpoint are shared out."""

    @operation("execute", Endpoint, body=SplitEndpoint)
    async def post(self, name: str, body: SplitEndpoint) -> Endpoint:
        """Share the requests out over two revisions, in percent; requests of one key stay with one revision."""
        await self.started()
        work = self.endpoints.split(name, body.shares)
        return self.told((await self.carry_out("endpoint.split", name, work, shares=body.shares)).describe())


class EndpointRollbackHandler(_EndpointHandler):
    """Back to what an endpoint served before."""

    @operation("execute", Endpoint, body=NoFields)
    async def post(self, name: str, body: NoFields) -> Endpoint:
        """Without the canary; where there is none, back to the revision before this one."""
        await self.started()
        return self.told((await self.carry_out("endpoint.rollback", name, self.endpoints.rollback(name))).describe())


class EndpointShadowHandler(_EndpointHandler):
    """Copies of the requests to an endpoint."""

    @operation("execute", Endpoint, body=ShadowEndpoint)
    async def post(self, name: str, body: ShadowEndpoint) -> Endpoint:
        """Copy the requests to another revision, whose answers are compared; null ends that."""
        await self.started()
        work = self.endpoints.shadow(name, body.revision)
        return self.told((await self.carry_out("endpoint.shadow", name, work, revision=body.revision)).describe())


class EndpointAdaptersHandler(_EndpointHandler):
    """The adapters of an endpoint."""

    @operation("execute", Endpoint, 201, body=AddAdapter)
    async def post(self, name: str, body: AddAdapter) -> Endpoint:
        """Load an adapter of PEFT beside the model, while it answers. It is asked for as the model NAME:ADAPTER."""
        await self.started()
        work = self.endpoints.add_adapter(name, body.target, body.name)
        endpoint = await self.carry_out("endpoint.adapter", name, work, target=body.target, adapter=body.name)
        return self.told(endpoint.describe())


class EndpointAdapterHandler(_EndpointHandler):
    """One adapter of an endpoint."""

    @operation("execute", Endpoint)
    async def delete(self, name: str, adapter: str) -> Endpoint:
        """Take an adapter away; the model goes on answering."""
        await self.started()
        work = self.endpoints.remove_adapter(name, adapter)
        return self.told((await self.carry_out("endpoint.adapter", name, work, removed=adapter)).describe())


class EndpointLogsHandler(_EndpointHandler):
    """What the replicas of an endpoint printed."""

    @operation("read", EndpointLogs, query=EndpointLogsQuery)
    async def get(self, name: str, query: EndpointLogsQuery) -> EndpointLogs:
        """The newest lines of each replica of an endpoint."""
        await self.started()
        paths = self.endpoints.get(name).logs()
        texts = await asyncio.gather(*(asyncio.to_thread(last_lines, Path(path), query.limit) for path in paths))
        return EndpointLogs(logs=[ReplicaLog(path=path, text=text) for path, text in zip(paths, texts, strict=True)])


def _kept(source: ServedSource, name: str) -> ModelFolder:
    """Code that was sent, checked and kept. Raises UsageError, NotFound."""
    if source.object:
        return of_code(served_code.object_file(source.object), name)
    cell = CellSource(source.text, source.name, source.first_line, source.folder)
    check_source(cell)
    return of_code(served_code.write_cell(cell), name)


def last_lines(path: Path, limit: int) -> str:
    """The end of a text file; empty when it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, maxlen=limit))
    except OSError:
        return ""
