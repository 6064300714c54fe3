"""Where ranks go: slots of agents in, an assignment out. One slot holds one rank: a GPU, or a share of a CPU host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jupyter_llmcloud.errors import Busy, CapacityError, UsageError


def agent_key(host: str, address: str) -> str:
    """Names an agent alike on every host: by its own socket, there; whoever takes a killed one's place has it too."""
    return f"{host}:{address}"


@dataclass(frozen=True)
class AgentSlots:
    """What one node agent offers. `free` of its `total` slots hold no rank; `has_gpus` says what a slot is."""

    address: str
    host: str
    total: int
    free: int
    has_gpus: bool = False


@dataclass(frozen=True)
class Allocation:
    """`num_ranks` ranks go to the agent at `address`."""

    address: str
    host: str
    num_ranks: int


def default_num_ranks(agents: Sequence[AgentSlots]) -> int:
    """One rank per GPU; without a GPU two, or as many as there are slots."""
    gpus = sum(agent.total for agent in agents if agent.has_gpus)
    return gpus or max(1, min(2, sum(agent.total for agent in agents)))


def place(
    num_ranks: int | None, agents: Sequence[AgentSlots], holders: str = "", *, at_least: int = 0
) -> list[Allocation]:
    """All ranks or none: fill the agent with the most free slots first, so that a world spans few hosts.

    `holders` says who has the slots that are not free, for the message of Busy. With `at_least` fewer ranks will do,
    down to so many: as many as there is room for.

    Raises CapacityError when the cluster could never hold `num_ranks`, Busy when it cannot hold them now.
    """
    if num_ranks is None:
        num_ranks = default_num_ranks(agents)
    if num_ranks < 1:
        raise UsageError(f"-n {num_ranks}: a world has at least one rank.")
    total, free = sum(agent.total for agent in agents), sum(agent.free for agent in agents)
    if at_least:
        num_ranks = max(at_least, min(num_ranks, free))
    if not total:
        raise CapacityError(
            "the cluster has no workers: add some with %cluster scale, or where it was started, if it was only "
            "connected to (dask worker ADDRESS)."
        )
    if num_ranks > total:
        raise CapacityError(
            f"-n {num_ranks}: the cluster holds {total} rank{'s' if total != 1 else ''} ({_describe(agents)}). "
            f"Choose -n {total} or less, or add workers with %cluster scale."
        )
    if num_ranks > free:
        raise Busy(
            f"-n {num_ranks}: {free} of {total} slots are free, the others hold {holders or 'ranks of other worlds'}. "
            "Stop one of them (%world stop WORLD), choose a smaller -n, or add workers with %cluster scale."
        )
    allocations: list[Allocation] = []
    left = num_ranks
    for agent in sorted(agents, key=lambda agent: -agent.free):
        take = min(left, agent.free)
        if take:
            allocations.append(Allocation(agent.address, agent.host, take))
            left -= take
    return allocations


def _describe(agents: Sequence[AgentSlots]) -> str:
    kind = "GPUs" if any(agent.has_gpus for agent in agents) else "CPU slots"
    return ", ".join(f"{agent.host}: {agent.total} {kind}" for agent in agents)
