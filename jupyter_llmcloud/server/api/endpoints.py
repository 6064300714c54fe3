"""Endpoints: started, watched, stopped."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_server.utils import url_path_join

from jupyter_llmcloud.core.spec import EndpointSpec, Interface
from jupyter_llmcloud.server.api.base import LLMCloudHandler, access, expect

if TYPE_CHECKING:
    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry

MAX_WAIT_S = 60
MAX_LINES = 10_000


class _EndpointHandler(LLMCloudHandler):
    def initialize(self, endpoints: EndpointRegistry, **shared: Any) -> None:  # type: ignore[override]
        super().initialize(**shared)
        self.endpoints = endpoints

    def told(self, endpoint: EndpointController) -> dict[str, Any]:
        """Its record, with the URL under which this client reached the server."""
        origin = f"{self.request.protocol}://{self.request.host}"
        return {**endpoint.describe(), "url": origin + url_path_join(self.base_url, "llmcloud/v1")}


class EndpointsHandler(_EndpointHandler):
    """All endpoints."""

    @access("read")
    async def get(self) -> None:
        """List them, the newest first."""
        await self.started()
        self.answer({"endpoints": [self.told(endpoint) for endpoint in self.endpoints.list()]})

    @access("execute")
    async def post(self) -> None:
        """Serve a run's model or a folder. Answers at once; the endpoint is starting then."""
        await self.started()
        fields = self.fields("target", *(option.name for option in EndpointSpec.options(Interface.REST)))
        target = expect(str, "target", fields.pop("target", None))
        spec = EndpointSpec.make(fields, Interface.REST)
        work = self.endpoints.create(
            target, spec.name, spec.replicas, spec.dtype, spec.cluster,
            base_model=spec.base_model, max_model_len=spec.max_model_len, max_concurrent=spec.max_concurrent,
            threads=spec.threads,
        )  # fmt: skip
        endpoint = await self.carry_out("endpoint.start", (spec.name or target)[:128], work, target=target)
        self.answer(self.told(endpoint), 201)


class EndpointHandler(_EndpointHandler):
    """One endpoint."""

    @access("read")
    async def get(self, name: str) -> None:
        """Its record; `?wait_s=` waits until it is not starting any more."""
        await self.started()
        endpoint = self.endpoints.get(name)
        wait_s = self.number("wait_s", 0, MAX_WAIT_S)
        if wait_s:
            await endpoint.wait("starting", wait_s)
        self.answer(self.told(endpoint))

    @access("execute")
    async def delete(self, name: str) -> None:
        """Stop it; one that is stopped already is forgotten."""
        await self.started()
        self.answer(await self.carry_out("endpoint.stop", name, self.endpoints.stop(name)))


class EndpointLogsHandler(_EndpointHandler):
    """What the replicas of an endpoint printed."""

    @access("read")
    async def get(self, name: str) -> None:
        """The newest `?limit=` lines of each replica."""
        await self.started()
        limit = self.number("limit", 200, MAX_LINES)
        paths = self.endpoints.get(name).logs()
        texts = await asyncio.gather(*(asyncio.to_thread(last_lines, Path(path), limit) for path in paths))
        self.answer({"logs": [{"path": path, "text": text} for path, text in zip(paths, texts, strict=True)]})


def last_lines(path: Path, limit: int) -> str:
    """The end of a text file; empty when it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, maxlen=limit))
    except OSError:
        return ""
