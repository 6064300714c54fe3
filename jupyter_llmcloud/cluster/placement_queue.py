"""Which agents get the ranks of a world, and whose turn it is: a queue for each cluster."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Sequence

from jupyter_llmcloud.cluster.agent_info import AgentInfo
from jupyter_llmcloud.core.scheduling.holders import HeldWorld, list_worlds
from jupyter_llmcloud.core.scheduling.placement import AgentSlots, Allocation, default_num_ranks, place
from jupyter_llmcloud.core.scheduling.queue import Capacity, PlacementQueue
from jupyter_llmcloud.errors import Busy

REPLICA_LEASE_S = 4.0  # a replica that waits for room asks every few seconds


class NoSlots(Busy):
    """There are no slots now; `missing`: how many more would have to be free."""

    def __init__(self, reason: str, missing: int) -> None:
        super().__init__(reason)
        self.missing = missing


class PlacementQueues:
    """Those who wait for slots, by cluster. Whoever asks with the same ticket again keeps its place."""

    def __init__(self) -> None:
        self._queues: defaultdict[str, PlacementQueue] = defaultdict(PlacementQueue)

    def come(self, cluster_id: str, ticket: str, priority: int = 0) -> None:
        """The holder of a ticket asks; the cluster is looked at next."""
        if ticket:
            self._queues[cluster_id].renew(ticket, time.monotonic(), priority)

    def admit_replica(
        self, cluster_id: str, ticket: str, num_slots: int, agents: Sequence[AgentInfo], priority: int
    ) -> None:
        """Let a replica have slots. Raises Busy while others of higher priority wait that could have them.

        It comes before worlds of its own priority: one that is replaced must not wait for a training to begin and end.
        """
        free, total = sum(agent.free_slots for agent in agents), sum(agent.num_slots for agent in agents)
        verdict = self._queues[cluster_id].ask(
            ticket, num_slots, Capacity(free, total), ticket, time.monotonic(), priority=priority + 0.5,
            lease_s=REPLICA_LEASE_S,
        )  # fmt: skip
        if not verdict.goes and num_slots <= free:
            raise Busy(f"{free} of {total} slots are free, kept for others that wait or are being started")

    def leave(self, cluster_id: str, ticket: str) -> None:
        """The holder of a ticket waits for something else than slots."""
        self._queues[cluster_id].leave(ticket)

    def place(
        self,
        cluster_id: str,
        ticket: str,
        num_ranks: int | None,
        agents: Sequence[AgentInfo],
        replaces: str = "",
        priority: int = 0,
    ) -> tuple[list[Allocation], str]:
        """Shares, and the id of the world that is to be started there, in place of the world `replaces` if any.

        Raises CapacityError when the cluster can never hold it, Busy when it cannot now, or when others come first:
        then a world that is to be replaced stays, and nobody waits.
        """
        traded = {agent.address: agent.held.get(replaces, 0) for agent in agents}
        slots = [
            AgentSlots(a.address, a.host, a.num_slots, a.free_slots + traded[a.address], a.has_gpus) for a in agents
        ]
        holders = [HeldWorld.read(world) for agent in agents for world in agent.worlds if world["world_id"] != replaces]
        queue = self._queues[cluster_id]
        try:
            allocations, busy = place(num_ranks, slots, list_worlds(holders)), None
        except Busy as error:
            allocations, busy = [], error
        except Exception:
            queue.leave(ticket)
            raise
        wanted = sum(allocation.num_ranks for allocation in allocations) or num_ranks or default_num_ranks(slots)
        cluster = Capacity(
            sum(agent.free for agent in slots),
            sum(agent.total for agent in slots),
            {world["world_id"] for agent in agents for world in agent.worlds},
            {world_id for agent in agents for world_id in agent.begun},
        )
        world_id = secrets.token_hex(6)
        verdict = queue.ask(ticket, wanted, cluster, world_id, time.monotonic(), sum(traded.values()), priority)
        if replaces and (busy is not None or not verdict.goes):
            queue.leave(ticket)
        if busy is not None:
            raise NoSlots(str(busy), max(0, wanted - cluster.free))
        if not verdict.goes:
            others = f"kept for {verdict.before} ranks of others who have waited longer"
            reason = others if verdict.before else "about to be taken by worlds that are being started"
            raise Busy(f"-n {wanted}: {cluster.free} of {cluster.total} slots are free, but {reason}.")
        return allocations, world_id
