"""Where a replica goes: what it needs beside what the agents of a cluster have free. The pool is that of training.

What is stated is kept: the cores that replicas of a host have together, and one for each rank there, are never more
than it has; a replica's cores are as many slots that training does not get meanwhile; its memory is free when it
starts, and kept free of other replicas until it has taken it. What is not stated is shared, as before. Who is there
first keeps its place: a replica waits for ranks to end, and ranks wait for replicas to be stopped or scaled down. Who
waits comes in the order of priorities (`queue`), and what an endpoint has beyond its least it gives back to those of
higher priority (`priorities`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jupyter_llmcloud.errors import Busy, CapacityError

REPLICA = "replica "  # how a replica's slots are named among those who hold some


@dataclass(frozen=True)
class ReplicaNeeds:
    """What a replica was promised; None: nothing was stated. `devices`: GPUs."""

    cores: int | None = None
    memory_bytes: int | None = None
    devices: int | None = None

    def slots(self, has_gpus: bool) -> int:
        """How many slots it takes: a GPU each where there are some, else one for each core of its own."""
        return (self.devices or 1) if has_gpus and self.devices != 0 else 0 if has_gpus else self.cores or 0


@dataclass(frozen=True)
class AgentRoom:
    """What one agent has.

    Attributes:
        host: several agents may be on one host, whose cores and memory they share.
        free_slots: that hold neither a rank nor a replica with cores.
        num_cores: of its host.
        reserved_cores: that its replicas have.
        num_ranks: ranks of training that it holds.
        free_memory_bytes: of its host; 0: not known.
        promised_bytes: to its replicas, which have not taken it yet.
    """

    address: str
    host: str
    free_slots: int
    has_gpus: bool = False
    num_replicas: int = 0
    num_cores: int = 0
    reserved_cores: int = 0
    num_ranks: int = 0
    free_memory_bytes: int = 0
    promised_bytes: int = 0


def ranks_among(held: Mapping[str, int]) -> int:
    """How many of the slots that are held are held by ranks."""
    return sum(number for holder, number in held.items() if not holder.startswith(REPLICA))


def place_replica(needs: ReplicaNeeds, agents: Sequence[AgentRoom]) -> str:
    """The address of the agent that takes a replica: the one with the fewest of them, among those that have room.

    Raises CapacityError when no host could ever hold it, Busy when none can now; both say what is missing.
    """
    reasons = {agent.address: _why_not(needs, agent, agents) for agent in agents}
    fitting = [agent for agent in agents if not reasons[agent.address]]
    if fitting:
        return min(fitting, key=lambda agent: (agent.num_replicas, -agent.free_slots)).address
    text = "; ".join(sorted(set(reasons.values())))
    if all(_never(needs, agent) for agent in agents):
        raise CapacityError(f"no host of the cluster can hold a replica: {text}.")
    raise Busy(f"no host of the cluster has room for a replica now: {text}.")


def _never(needs: ReplicaNeeds, agent: AgentRoom) -> bool:
    return bool(needs.devices and not agent.has_gpus) or bool(agent.num_cores and (needs.cores or 0) > agent.num_cores)


def _why_not(needs: ReplicaNeeds, agent: AgentRoom, agents: Iterable[AgentRoom]) -> str:
    """What an agent lacks; "" when nothing."""
    beside = [other for other in agents if other.host == agent.host]
    if needs.devices and not agent.has_gpus:
        return f"--devices {needs.devices}: {agent.host} has no GPU"
    if agent.has_gpus and needs.devices != 0 and agent.free_slots < (needs.devices or 1):
        return f"{needs.devices or 1} GPU is asked for, {agent.free_slots} are free on {agent.host}"
    if needs.cores and agent.num_cores:
        ranks, reserved = sum(one.num_ranks for one in beside), sum(one.reserved_cores for one in beside)
        free = max(0, agent.num_cores - ranks - reserved)
        if needs.cores > free:
            return (
                f"--cores {needs.cores}: {free} of the {agent.num_cores} cores of {agent.host} are free "
                f"({ranks} have ranks, {reserved} other replicas)"
            )
        if not agent.has_gpus and needs.cores > agent.free_slots:
            return f"--cores {needs.cores}: {agent.free_slots} slots are free on {agent.host}"
    if needs.memory_bytes and agent.free_memory_bytes:
        memory = max(0, agent.free_memory_bytes - sum(one.promised_bytes for one in beside))
        if needs.memory_bytes > memory:
            return f"--memory {_gib(needs.memory_bytes)}: {_gib(memory)} are free on {agent.host}"
    return ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g}GiB"
