"""Worlds: who holds them, what their ranks do, their end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.core.run.stacks import fold_stacks
from jupyter_llmcloud.core.scheduling.holders import HeldWorld
from jupyter_llmcloud.protocol.http.worlds import (
    RankVariables,
    Stacks,
    Variable,
    World,
    Worlds,
    WorldsQuery,
    WorldVariables,
)
from jupyter_llmcloud.server.api.clusters import ClusterHandlerBase
from jupyter_llmcloud.server.api.operation import operation


class WorldsHandler(ClusterHandlerBase):
    """The worlds of all clusters."""

    @operation("read", Worlds, query=WorldsQuery)
    async def get(self, query: WorldsQuery) -> Worlds:
        """List the worlds, of one cluster if one is named; the newest first."""
        pool = await self.clusters.pool()
        rows = [as_world(world, cluster) for cluster, world in await pool.worlds(query.cluster)]
        return Worlds(worlds=sorted(rows, key=lambda row: -row.started))


class WorldHandler(ClusterHandlerBase):
    """One world."""

    @operation("execute", World)
    async def delete(self, name: str) -> World:
        """End a world, whoever has it: its variables are gone, and a run that is executed there is stopped."""
        pool = await self.clusters.pool()
        return as_world(await self.carry_out("world.stop", name, pool.stop_world(name)))


class WorldStacksHandler(ClusterHandlerBase):
    """Where the ranks of a world are."""

    @operation("read", Stacks)
    async def get(self, name: str) -> Stacks:
        """What every rank of a world is doing now, also while a run goes on; what is equal is said once."""
        pool = await self.clusters.pool()
        world_id, found = await pool.world_stacks(name)
        return Stacks(world_id=world_id, lines=fold_stacks(found.ranks, found.cells))


class WorldVariablesHandler(ClusterHandlerBase):
    """What the ranks of a world hold."""

    @operation("read", WorldVariables)
    async def get(self, name: str) -> WorldVariables:
        """The user's variables of every rank by name, type and size, also while a run goes on."""
        pool = await self.clusters.pool()
        world_id, found = await pool.world_variables(name)
        return WorldVariables(world_id=world_id, ranks=[_variables(rank, row) for rank, row in found.ranks.items()])


def _variables(rank: int, row: Mapping[str, Any]) -> RankVariables:
    known = [Variable(**variable) for variable in row.get("variables", ())]
    return RankVariables(rank=rank, variables=known, problem=row.get("problem", ""))


def as_world(world: HeldWorld, cluster: str = "") -> World:
    """What is told of a world."""
    return World(
        world_id=world.world_id,
        cluster=cluster,
        holder=world.holder,
        num_ranks=world.world_size,
        state=world.state,
        run_id=world.run_id,
        started=world.started,
    )
