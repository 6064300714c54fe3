"""Worlds: where their ranks are placed, who holds them, what they do, how they are ended."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from jupyter_llmcloud.protocol.http.base import Body, Query, Response


class WorldsQuery(Query, frozen=True):
    """Which worlds."""

    cluster: Annotated[str | None, Meta(description="Name of a cluster; of all clusters when left out.")] = None


class Split(Response, frozen=True):
    """Where a rank's time goes, as shares that add up to 1."""

    compute: Annotated[float, Meta(description="All that is none of the others.")] = 0.0
    communication: Annotated[
        float, Meta(description="In collectives, as long as the rank that was blocked least in them.")
    ] = 0.0
    data: Annotated[float, Meta(description="In data loaders.")] = 0.0
    waiting: Annotated[float, Meta(description="In collectives, beyond that: for other ranks.")] = 0.0
    checkpoint: Annotated[float, Meta(description="In saving.")] = 0.0


class WorldRank(Response, frozen=True):
    """A rank of a world. What is not known is null."""

    rank: int
    state: str = ""
    detail: Annotated[str, Meta(description="What it does, in a few words.")] = ""
    local_rank: int | None = None
    host: str = ""
    device: str = ""
    pid: int | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    utilization: Annotated[float | None, Meta(description="Of its device, from 0 to 1.")] = None
    last_seen: Annotated[float | None, Meta(description="Seconds since the epoch.")] = None
    split: Annotated[Split | None, Meta(description="Where its time has gone in the last seconds of a run.")] = None


class World(Response, frozen=True):
    """A world: the ranks that a notebook, a process or a run has."""

    world_id: str
    cluster: Annotated[str, Meta(description="Name of the cluster that it is on.")]
    holder: Annotated[str, Meta(description="Who has it, in words: the end of a notebook's path, a process, a run.")]
    num_ranks: int
    state: Annotated[str, Meta(description="What it does now, in words: idle, executes RUN, unused and ends in 20 s.")]
    run_id: Annotated[str, Meta(description="The run that is executed there now; empty for none.")] = ""
    started: Annotated[float, Meta(description="Seconds since the epoch.")] = 0.0
    ranks: Annotated[list[WorldRank] | None, Meta(description="Its ranks; null where they were not looked at.")] = None


class Worlds(Response, frozen=True):
    """Worlds, the newest first."""

    worlds: list[World]


class Stacks(Response, frozen=True):
    """What every rank of a world is doing now. What is equal is said once."""

    world_id: str
    lines: Annotated[list[str], Meta(description="As text: which ranks, what they do, and below it where.")]


class Variable(Response, frozen=True):
    """A variable of a rank; what it holds is not told."""

    name: str
    type: Annotated[str, Meta(description="Name of its class.")]
    text: Annotated[str, Meta(description="Its shape, its length or its value, in few words; masked when secret.")] = ""
    num_bytes: Annotated[int | None, Meta(description="Of tensors, arrays and modules; null: not known.")] = None
    role: Annotated[str, Meta(description="What it can be served as: model, tokenizer, code; empty for none.")] = ""


class RankVariables(Response, frozen=True):
    """The user's variables of a rank."""

    rank: int
    variables: list[Variable] = []
    problem: Annotated[str, Meta(description="Why they cannot be told now; empty when they are.")] = ""


class WorldVariables(Response, frozen=True):
    """The user's variables of every rank of a world."""

    world_id: str
    ranks: list[RankVariables]


class AskPlacement(Body, frozen=True):
    """Ranks that want a place."""

    cluster: Annotated[str | None, Meta(description="The newest when left out; one is started when there is none.")] = (
        None
    )
    num_ranks: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="One per GPU when left out, two where there is none.")
    ] = None
    ticket: Annotated[
        str, Meta(max_length=64, description="Any text of the caller's own, by which it keeps its place in the line.")
    ] = ""
    priority: Annotated[
        int, Meta(description="Those with a higher one come first; endpoints with a lower one give slots back.")
    ] = 0
    replaces: Annotated[
        str, Meta(description="Id of a world that the caller ends next: its slots count as free. Needs a ticket.")
    ] = ""


class AgentPlacement(Response, frozen=True):
    """How many ranks go to which node agent."""

    address: Annotated[str, Meta(description="Its socket on the server's host.")]
    host: str
    num_ranks: int
    home: Annotated[str, Meta(description="Its socket as the first of the agents, the leader, reaches it.")]


class Placement(Response, frozen=True):
    """Where the ranks of a new world go."""

    cluster: str
    world_id: Annotated[str, Meta(description="For the world that is started there.")]
    agents: Annotated[list[AgentPlacement], Meta(description="The first one leads the world.")]
    num_ranks: int
    started: Annotated[bool, Meta(description="Whether a cluster was started for it.")]


class Waiting(Response, frozen=True):
    """There are no free slots now; whoever asks again with the same ticket within two seconds keeps its place."""

    reason: str
    state: Literal["waiting"] = "waiting"
