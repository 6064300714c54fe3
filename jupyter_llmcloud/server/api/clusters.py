"""Clusters, and where a world or a replica may be placed on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.names import check_name
from jupyter_llmcloud.core.scheduling.holders import HeldWorld
from jupyter_llmcloud.errors import Busy, UsageError
from jupyter_llmcloud.server.api.base import LLMCloudHandler, access, expect

if TYPE_CHECKING:
    from jupyter_llmcloud.server.cluster_access import ClusterAccess

MAX_WORKERS = 10_000
MAX_TICKET = 64


class _ClusterHandler(LLMCloudHandler):
    def initialize(self, clusters: ClusterAccess, **shared: Any) -> None:  # type: ignore[override]
        super().initialize(**shared)
        self.clusters = clusters


class ClustersHandler(_ClusterHandler):
    """All clusters."""

    @access("read")
    async def get(self) -> None:
        """List them."""
        pool = await self.clusters.pool()
        self.answer({"clusters": [record.public() for record in await pool.list()]})

    @access("execute")
    async def post(self) -> None:
        """Start one, or connect to one that runs elsewhere (`address`)."""
        fields = self.fields("kind", "name", "workers", "options", "address")
        name = check_name(expect(str, "name", fields["name"]), "cluster") if "name" in fields else None
        pool = await self.clusters.pool()
        if "address" in fields:
            if set(fields) - {"address", "name"}:
                raise UsageError("a cluster is connected to by address and name alone.")
            address = expect(str, "address", fields["address"])
            record = await self.carry_out("cluster.connect", name or address, pool.connect(address, name))
        else:
            kind = expect(str, "kind", fields.get("kind", "local"))
            workers = expect(int, "workers", fields["workers"]) if "workers" in fields else None
            options = expect(dict, "options", fields.get("options", {}))
            work = pool.start(kind=kind, name=name, workers=workers, options=options)
            record = await self.carry_out("cluster.start", name or kind, work, workers=workers)
        self.answer(record.public(), 201)


class ClusterHandler(_ClusterHandler):
    """One cluster."""

    @access("execute")
    async def delete(self, name: str) -> None:
        """Stop it."""
        pool = await self.clusters.pool()
        await self.carry_out("cluster.stop", name, pool.stop(name))
        self.answer({"name": name, "state": "stopped"})


class ClusterScaleHandler(_ClusterHandler):
    """The size of a cluster."""

    @access("execute")
    async def post(self, name: str) -> None:
        """Change its number of workers, or the bounds between which the load decides."""
        fields = self.fields("workers", "minimum", "maximum")
        for field, value in fields.items():
            if not 0 <= expect(int, field, value) <= MAX_WORKERS:
                raise UsageError(f"{field} {value} is not possible: 0 to {MAX_WORKERS}.")
        pool = await self.clusters.pool()
        if set(fields) == {"workers"}:
            work = pool.scale(name, fields["workers"])
        elif set(fields) == {"minimum", "maximum"}:
            work = pool.adapt(name, fields["minimum"], fields["maximum"])
        else:
            raise UsageError("a cluster is scaled to workers, or between minimum and maximum.")
        record = await self.carry_out("cluster.scale", name, work, **fields)
        self.answer(record.public())


class PlacementHandler(_ClusterHandler):
    """Where a world's ranks go."""

    @access("execute")
    async def post(self) -> None:
        """Choose agents for `num_ranks` ranks; with no cluster a local one is started.

        With a `ticket`, a lack of slots is no error: the answer is 202 with {"state": "waiting", "reason"}, and who
        asks again with it within two seconds keeps its place in the line. With `replaces`, the slots of that world
        count as free, and a lack of slots is refused: it is asked before that world is ended.
        """
        fields = self.fields("cluster", "num_ranks", "ticket", "replaces")
        cluster = expect(str, "cluster", fields["cluster"]) if "cluster" in fields else None
        num_ranks = expect(int, "num_ranks", fields["num_ranks"]) if "num_ranks" in fields else None
        if num_ranks is not None and num_ranks < 1:
            raise UsageError(f"num_ranks {num_ranks} is not possible: a world has at least one rank.")
        ticket = expect(str, "ticket", fields.get("ticket", ""))
        if len(ticket) > MAX_TICKET:
            raise UsageError(f"ticket has {len(ticket)} characters: {MAX_TICKET} at most.")
        replaces = expect(str, "replaces", fields.get("replaces", ""))
        if replaces and not ticket:
            raise UsageError("replaces needs a ticket, which keeps the slots until that world has ended.")
        pool = await self.clusters.pool()
        work = pool.place(cluster, num_ranks, ticket, replaces)
        waits = Busy if ticket and not replaces else ()
        try:
            placed = await self.carry_out("world.place", cluster or "", work, no_refusal=waits, num_ranks=num_ranks)
            status = 200
        except Busy as busy:
            if not waits:
                raise
            placed, status = {"state": "waiting", "reason": str(busy)}, 202
        self.answer(placed, status)


class WorldsHandler(_ClusterHandler):
    """The worlds of all clusters."""

    @access("read")
    async def get(self) -> None:
        """List them, of one cluster if one is named; the newest first."""
        pool = await self.clusters.pool()
        found = await pool.worlds(self.get_query_argument("cluster", None))
        rows = [_public(world, cluster) for cluster, world in found]
        self.answer({"worlds": sorted(rows, key=lambda row: -row["started"])})


class WorldHandler(_ClusterHandler):
    """One world."""

    @access("execute")
    async def delete(self, name: str) -> None:
        """End it, whoever has it: its variables are gone, and a run that is executed there is stopped."""
        pool = await self.clusters.pool()
        ended = await self.carry_out("world.stop", name, pool.stop_world(name))
        self.answer(_public(ended))


def _public(world: HeldWorld, cluster: str = "") -> dict[str, Any]:
    """What is told of a world."""
    return {
        "world_id": world.world_id,
        "cluster": cluster,
        "holder": world.holder,
        "num_ranks": world.world_size,
        "state": world.state,
        "run_id": world.run_id,
        "started": world.started,
    }
