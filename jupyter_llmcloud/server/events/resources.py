"""What is known of hosts, devices and processes: asked of the node agents while somebody looks at it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from jupyter_llmcloud.core.scheduling.holders import HeldWorld
from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.protocol.http.clusters import Cluster, Device, Process, Worker
from jupyter_llmcloud.protocol.http.worlds import Split, World, WorldRank

if TYPE_CHECKING:
    from jupyter_llmcloud.cluster.agent_info import AgentView
    from jupyter_llmcloud.server.cluster_access import ClusterAccess
    from jupyter_llmcloud.storage.runs import RunRecord, RunStore

KEEP_S = 1.0  # clusters and worlds are told from one look
RANKS_S = 2.0
STARTS_S = 15.0  # a rank that was not there when its host was looked at is about to come, in a world as young as this
FULL = 0.95  # of a host's memory: from here on processes are killed for it
_TEXTS = {"agent": "node agent", "zygote": "holds what ranks import, and forks them"}


class Resources:
    """Of all clusters of a server."""

    def __init__(self, clusters: ClusterAccess, runs: RunStore) -> None:
        self._clusters = clusters
        self._runs = runs
        self._looks: dict[str, tuple[float, asyncio.Task[list[AgentView]]]] = {}
        self._seen: dict[str, Sequence[AgentView]] = {}  # by cluster
        self._tasks: set[asyncio.Task[None]] = set()

    async def _look(self, cluster: str, keep_s: float = KEEP_S) -> Sequence[AgentView]:
        """The workers of a cluster as they are now, or were a moment ago. Raises LLMCloudError."""
        asked_at, look = self._looks.get(cluster, (float("-inf"), None))
        if look is None or (look.done() and time.monotonic() - asked_at >= keep_s):
            pool = await self._clusters.pool()
            look = asyncio.ensure_future(pool.look(cluster))
            self._looks[cluster] = (time.monotonic(), look)
        self._seen[cluster] = seen_at(await asyncio.shield(look), time.time())
        return self._seen[cluster]

    async def of_cluster(self, cluster: Cluster) -> Cluster:
        """With its workers. Raises LLMCloudError."""
        if cluster.state != "running":
            return cluster
        views = await self._look(cluster.name)
        worlds = worlds_of(views)
        return msgspec.structs.replace(cluster, workers=[worker_of(view, worlds) for view in views])

    async def of_world(self, world: World) -> World:
        """With its ranks. Raises LLMCloudError."""
        found = ranks_of(await self._look(world.cluster), world.world_id)
        state = "running" if world.run_id else "idle"
        splits = await asyncio.to_thread(self._splits, world.run_id)
        unseen = "starting" if time.time() - world.started < STARTS_S else "lost"
        ranks = [
            WorldRank(
                rank=rank,
                state=state if rank in found else unseen,
                local_rank=None,
                split=splits.get(rank),
                **{name: value for name, value in found.get(rank, {}).items() if name in _WORLD_RANK},
            )
            for rank in range(world.num_ranks)
        ]
        return msgspec.structs.replace(world, ranks=ranks)

    def _splits(self, run_id: str) -> dict[int, Split]:
        """Where the ranks of a run spend their time now; nothing of a run that does not say."""
        if not run_id:
            return {}
        shares, _ = self._runs.folder(run_id).read_times()
        return {rank: Split(**parts) for rank, parts in shares.items()}

    def of_ranks(self, record: RunRecord | None) -> Mapping[int, Mapping[str, Any]]:
        """What was known a moment ago of the processes of a run's ranks, as fields of a RankInfo; looks again."""
        if record is None or not record.is_active or not record.cluster or not record.world_id:
            return {}
        asked_at, look = self._looks.get(record.cluster, (float("-inf"), None))
        if look is None or (look.done() and time.monotonic() - asked_at >= RANKS_S):
            task = asyncio.ensure_future(self._look_quietly(record.cluster))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return ranks_of(self._seen.get(record.cluster, ()), record.world_id)

    async def _look_quietly(self, cluster: str) -> None:
        with contextlib.suppress(LLMCloudError):  # of another server, or gone
            await self._look(cluster, RANKS_S)

    def close(self) -> None:
        """The server ends."""
        for task in [*self._tasks, *(look for _, look in self._looks.values())]:
            task.cancel()


_WORLD_RANK = ("host", "device", "pid", "memory_bytes", "gpu_memory_bytes", "utilization", "last_seen")


def seen_at(views: Sequence[AgentView], t: float) -> list[AgentView]:
    """The same, looked at when this clock says so: that of another host may be minutes apart."""
    return [
        replace(view, resources=msgspec.structs.replace(view.resources, t=t)) if view.resources is not None else view
        for view in views
    ]


def worlds_of(views: Sequence[AgentView]) -> dict[str, HeldWorld]:
    """Every world that one of these agents leads, by its id."""
    rows = [row for view in views if view.agent is not None for row in view.agent.worlds]
    return {world.world_id: world for world in map(HeldWorld.read, rows)}


def worker_of(view: AgentView, worlds: Mapping[str, HeldWorld]) -> Worker:
    """A worker as the API tells of it."""
    if view.agent is None:
        return Worker(name=view.worker, address=view.worker, host=view.host, state="silent", warning=f"{view.silence}.")
    agent, found = view.agent, view.resources
    about: dict[str, Any] = {}
    if found is not None:
        about = {
            "num_cores": found.num_cores,
            "cpu": found.cpu,
            "memory_bytes": found.memory_bytes,
            "total_memory_bytes": found.total_memory_bytes,
            "devices": [Device(**row) for row in found.devices],
            "processes": [_process(row, worlds) for row in found.processes],
            "last_seen": found.t,
        }
        if found.memory_bytes >= FULL * found.total_memory_bytes:
            share = found.memory_bytes / found.total_memory_bytes
            about["warning"] = f"the memory of its host is {share:.0%} full: processes may be killed for it."
    return Worker(
        name=agent.name,
        address=view.worker,
        host=agent.host,
        num_slots=agent.num_slots,
        free_slots=agent.free_slots,
        **about,
    )


def _process(row: Mapping[str, Any], worlds: Mapping[str, HeldWorld]) -> Process:
    kept = {name: value for name, value in row.items() if name in Process.__struct_fields__}
    kind, world = row["kind"], worlds.get(row.get("world_id", ""))
    holder = world.holder if world is not None else ""
    text = _TEXTS.get(kind, kind)
    if kind == "replica":
        text = f"replica of endpoint {row.get('endpoint', '')}"
    elif kind == "rank":
        does = f"of run {world.run_id}" if world is not None and world.run_id else "idle"
        text = f"rank {row.get('rank')} {does}"
    return Process(**kept, text=text, run_id=world.run_id if world is not None else "", holder=holder)


def ranks_of(views: Sequence[AgentView], world_id: str) -> dict[int, dict[str, Any]]:
    """{rank: what is known of its process} of a world."""
    found: dict[int, dict[str, Any]] = {}
    for view in views:
        resources = view.resources
        for row in resources.processes if resources is not None else ():
            if row.get("world_id") != world_id or row.get("rank") is None:
                continue
            assert resources is not None
            known: dict[str, Any] = {
                name: row[name] for name in ("pid", "memory_bytes", "gpu_memory_bytes", "cpu") if name in row
            }
            known |= {"host": resources.host, "last_seen": resources.t, "device": "cpu"}
            for device in resources.devices:
                if device.get("index") == row.get("device"):
                    known |= {"device": f"cuda:{row['device']}", "utilization": device.get("utilization")}
            found[row["rank"]] = known
    return found
