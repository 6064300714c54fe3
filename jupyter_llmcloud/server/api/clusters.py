"""Clusters, and where a world or a replica may be placed on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from jupyter_llmcloud.core.names import check_name
from jupyter_llmcloud.errors import Busy, UsageError
from jupyter_llmcloud.protocol.http.clusters import Cluster, Clusters, ClusterStopped, ScaleCluster, StartCluster
from jupyter_llmcloud.protocol.http.worlds import AskPlacement, Placement, Waiting
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.operation import operation

if TYPE_CHECKING:
    from jupyter_llmcloud.server.cluster_access import ClusterAccess


class ClusterHandlerBase(LLMCloudHandler):
    """What the routes of clusters and worlds have in common."""

    def initialize(self, clusters: ClusterAccess, **shared: Any) -> None:  # type: ignore[override]
        """`clusters` gives the clusters of this server."""
        super().initialize(**shared)
        self.clusters = clusters


class ClustersHandler(ClusterHandlerBase):
    """All clusters."""

    @operation("read", Clusters)
    async def get(self) -> Clusters:
        """List the clusters."""
        pool = await self.clusters.pool()
        return Clusters(clusters=[Cluster(**record.public()) for record in await pool.list()])

    @operation("execute", Cluster, 201, body=StartCluster)
    async def post(self, body: StartCluster) -> Cluster:
        """Start a cluster and wait until it runs, or connect to one that runs elsewhere (`address`)."""
        name = check_name(body.name, "cluster") if body.name is not None else None
        if body.address is not None and body != StartCluster(address=body.address, name=body.name):
            raise UsageError("a cluster is connected to by address and name alone.")
        pool = await self.clusters.pool()
        if body.address is not None:
            work = pool.connect(body.address, name)
            record = await self.carry_out("cluster.connect", name or body.address, work)
        else:
            work = pool.start(kind=body.kind, name=name, workers=body.workers, options=body.options)
            record = await self.carry_out("cluster.start", name or body.kind, work, workers=body.workers)
        return Cluster(**record.public())


class ClusterHandler(ClusterHandlerBase):
    """One cluster."""

    @operation("execute", ClusterStopped)
    async def delete(self, name: str) -> ClusterStopped:
        """Stop a cluster and all that runs on it; one that was only connected to is left."""
        pool = await self.clusters.pool()
        await self.carry_out("cluster.stop", name, pool.stop(name))
        return ClusterStopped(name=name)


class ClusterScaleHandler(ClusterHandlerBase):
    """The size of a cluster."""

    @operation("execute", Cluster, body=ScaleCluster)
    async def post(self, name: str, body: ScaleCluster) -> Cluster:
        """Change a cluster's number of workers, or the bounds between which the load decides."""
        pool = await self.clusters.pool()
        match body:
            case ScaleCluster(workers=int(workers), minimum=None, maximum=None):
                work = pool.scale(name, workers)
            case ScaleCluster(workers=None, minimum=int(minimum), maximum=int(maximum)):
                work = pool.adapt(name, minimum, maximum)
            case _:
                raise UsageError("a cluster is scaled to workers, or between minimum and maximum.")
        asked = {key: value for key, value in msgspec.structs.asdict(body).items() if value is not None}
        record = await self.carry_out("cluster.scale", name, work, **asked)
        return Cluster(**record.public())


class PlacementHandler(ClusterHandlerBase):
    """Where a world's ranks go."""

    @operation("execute", Placement, body=AskPlacement, others={202: Waiting})
    async def post(self, body: AskPlacement) -> Placement | Waiting:
        """Choose agents for the ranks of a new world; with no cluster a local one is started.

        With a `ticket`, a lack of slots is no error: the answer is 202 with {"state": "waiting", "reason"}, and who
        asks again with it within two seconds keeps its place in the line. With `replaces`, the slots of that world
        count as free, and a lack of slots is refused: it is asked before that world is ended.
        """
        if body.replaces and not body.ticket:
            raise UsageError("replaces needs a ticket, which keeps the slots until that world has ended.")
        pool = await self.clusters.pool()
        work = pool.place(body.cluster, body.num_ranks, body.ticket, body.replaces, body.priority)
        waits = Busy if body.ticket and not body.replaces else ()
        try:
            subject, num_ranks = body.cluster or "", body.num_ranks
            placed = await self.carry_out("world.place", subject, work, no_refusal=waits, num_ranks=num_ranks)
        except Busy as busy:
            if not waits:
                raise
            return Waiting(reason=str(busy))
        return msgspec.convert(placed, Placement)
