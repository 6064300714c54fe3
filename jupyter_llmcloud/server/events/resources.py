"""What is known of hosts, devices and processes: asked of the node agents while somebody looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.protocol.http.clusters import Cluster
from jupyter_llmcloud.protocol.http.worlds import World

if TYPE_CHECKING:
    from jupyter_llmcloud.server.cluster_access import ClusterAccess
    from jupyter_llmcloud.storage.runs import RunRecord


class Resources:
    """Of all clusters of a server."""

    def __init__(self, clusters: ClusterAccess) -> None:
        self._clusters = clusters

    async def of_cluster(self, cluster: Cluster) -> Cluster:
        """With its workers."""
        return cluster

    async def of_world(self, world: World) -> World:
        """With its ranks."""
        return world

    def of_ranks(self, record: RunRecord | None) -> Mapping[int, Mapping[str, Any]]:
        """What is known of the processes of a run's ranks, as fields of a RankInfo."""
        return {}
