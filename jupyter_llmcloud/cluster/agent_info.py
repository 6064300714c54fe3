"""What the server knows of a node agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.core.scheduling.replica_room import AgentRoom, ranks_among
from jupyter_llmcloud.protocol.agent_messages import AgentDescription, AgentResources


@dataclass(frozen=True)
class AgentView:
    """A worker with its node agent as somebody who looks at the cluster sees it.

    Attributes:
        worker: address of the Dask worker.
        silence: why the agent says nothing; empty when it does.
        resources: None of an agent that does not tell.
    """

    worker: str
    silence: str = ""
    host: str = ""
    agent: AgentDescription | None = None
    resources: AgentResources | None = None


@dataclass(frozen=True)
class AgentInfo:
    """A node agent as the server sees it."""

    name: str
    address: str
    host: str
    num_slots: int
    free_slots: int
    has_gpus: bool
    num_replicas: int
    worlds: list[dict[str, Any]]  # those that it leads
    held: dict[str, int]  # slots here, by the ids of worlds
    begun: list[str]  # ids of worlds, some of which have ended
    worker: str  # address of the Dask worker beside it
    num_cores: int  # of its host; 0 of an agent that does not tell
    reserved_cores: int  # that its replicas have
    free_memory_bytes: int  # of its host
    promised_bytes: int  # of it, what its replicas may take still
    home: str  # its socket on its own host; `address` is what is connected to from here

    def room(self) -> AgentRoom:
        """What it has for replicas."""
        return AgentRoom(
            self.address, self.host, self.free_slots, self.has_gpus, self.num_replicas, self.num_cores,
            self.reserved_cores, ranks_among(self.held), self.free_memory_bytes, self.promised_bytes,
        )  # fmt: skip
