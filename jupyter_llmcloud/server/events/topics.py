"""How each topic is read: as the REST route of the same name tells of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from jupyter_llmcloud.protocol.http.clusters import Cluster
from jupyter_llmcloud.protocol.http.endpoints import Endpoint
from jupyter_llmcloud.protocol.http.events import Topic
from jupyter_llmcloud.protocol.http.keys import Key
from jupyter_llmcloud.protocol.http.worlds import World
from jupyter_llmcloud.server.api.endpoints import as_endpoint
from jupyter_llmcloud.server.api.keys import told
from jupyter_llmcloud.server.api.worlds import as_world
from jupyter_llmcloud.server.events.run_source import RunSource
from jupyter_llmcloud.server.events.sources import TopicSource

if TYPE_CHECKING:
    from jupyter_llmcloud.server.api.run_states import RunStates
    from jupyter_llmcloud.server.cluster_access import ClusterAccess
    from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry
    from jupyter_llmcloud.server.events.resources import Resources
    from jupyter_llmcloud.server.events.service import EventService
    from jupyter_llmcloud.storage.runs import RunStore
    from jupyter_llmcloud.storage.server_state import ServerState

CLUSTERS_S = 2.0
ENDPOINTS_S = 0.5
KEYS_S = 2.0  # other servers of this user mint keys, too, and keys expire
_CHANGED_BY: dict[str, tuple[Topic, ...]] = {
    "cluster": ("clusters", "worlds"),
    "world": ("clusters", "worlds"),
    "run": ("runs", "worlds", "clusters"),
    "endpoint": ("endpoints", "clusters"),
    "key": ("keys",),
}


def changed_by(action: str) -> tuple[Topic, ...]:
    """The topics that an action of the audit may have changed: `world.stop`, `key.mint`."""
    return _CHANGED_BY.get(action.partition(".")[0], ())


class Topics:
    """The readers of one server's topics."""

    def __init__(
        self, clusters: ClusterAccess, resources: Resources, endpoints: EndpointRegistry, state: ServerState
    ) -> None:
        self._clusters = clusters
        self._resources = resources
        self._endpoints = endpoints
        self._state = state

    def add_to(self, events: EventService, runs: RunStore, states: RunStates) -> None:
        """Make a source of each."""
        readers: list[
            tuple[Topic, Callable[[], Awaitable[list[Cluster] | list[World] | list[Endpoint] | list[Key]]], float]
        ] = [
            ("clusters", self._read_clusters, CLUSTERS_S),
            ("worlds", self._read_worlds, CLUSTERS_S),
            ("endpoints", self._read_endpoints, ENDPOINTS_S),
            ("keys", self._read_keys, KEYS_S),
        ]
        for topic, read, every_s in readers:
            events.add(TopicSource(events.hub, topic, read, every_s))
        events.add(RunSource(events.hub, runs, states, lambda: events.wake("worlds", "clusters")))

    async def _read_clusters(self) -> list[Cluster]:
        pool = await self._clusters.pool()
        return [await self._resources.of_cluster(Cluster(**record.public())) for record in await pool.list()]

    async def _read_worlds(self) -> list[World]:
        pool = await self._clusters.pool()
        found = await pool.worlds()
        return [await self._resources.of_world(as_world(world, cluster)) for cluster, world in found]

    async def _read_endpoints(self) -> list[Endpoint]:
        return [as_endpoint(endpoint.describe()) for endpoint in self._endpoints.list()]

    async def _read_keys(self) -> list[Key]:
        last_used = self._state.last_used()
        return [told(key, last_used.get(key.id)) for key in self._state.list_keys()]
