"""Sweeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tornado import web

from jupyter_llmcloud.protocol.http.search.sweeps import StartSweep, Sweep, SweepDeleted, SweepQuery, Sweeps
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.operation import NoFields, operation

if TYPE_CHECKING:
    from jupyter_llmcloud.server.sweeps.sweeps import SweepRegistry

MAX_PUSHED = 128 << 20


class SweepHandlerBase(LLMCloudHandler):
    """What these routes have in common."""

    def initialize(self, sweeps: SweepRegistry, **shared: Any) -> None:  # type: ignore[override]
        """`sweeps`: of this server."""
        super().initialize(**shared)
        self.sweeps = sweeps

    def content(self) -> bytes:
        """The body, which may hold variables."""
        if len(self.request.body) > MAX_PUSHED:
            raise web.HTTPError(413)
        return self.request.body


class SweepsHandler(SweepHandlerBase):
    """All sweeps."""

    @operation("read", Sweeps)
    async def get(self) -> Sweeps:
        """List sweeps, the newest first."""
        return Sweeps(sweeps=await self.sweeps.list())

    @operation("execute", Sweep, 201, body=StartSweep)
    async def post(self, body: StartSweep) -> Sweep:
        """Begin a sweep, or go on with one: its trials run without a kernel."""
        subject = str(body.given().get("name") or "")[:128]
        told: Sweep = await self.carry_out("sweep.start", subject, self.sweeps.start(body, self.actor))
        return told


class SweepHandler(SweepHandlerBase):
    """One sweep."""

    @operation("read", Sweep, query=SweepQuery)
    async def get(self, name: str, query: SweepQuery) -> Sweep:
        """A sweep with its trials."""
        return await self.sweeps.wait(name, query.seen, query.wait_s)

    @operation("write", SweepDeleted)
    async def delete(self, name: str) -> SweepDeleted:
        """Remove a sweep that has ended; its runs stay."""
        await self.carry_out("sweep.delete", name, self.sweeps.delete(name))
        return SweepDeleted(name=name)


class SweepStopHandler(SweepHandlerBase):
    """The end of a sweep."""

    @operation("execute", Sweep, body=NoFields)
    async def post(self, name: str, body: NoFields) -> Sweep:
        """Stop a sweep; what is done is kept, and the same sweep can be gone on with."""
        told: Sweep = await self.carry_out("sweep.stop", name, self.sweeps.stop(name))
        return told
