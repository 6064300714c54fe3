"""What the server knows of a node agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    home: str  # its socket on its own host; `address` is what is connected to from here
