"""What is asked of an agent or a cluster's host process, how it is answered, and what followers of a run are told."""

from __future__ import annotations

from typing import Any

from msgspec import field

from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rank_messages import CellEnded
from jupyter_llmcloud.protocol.rpc import Done, Reply, Request

# --- replies --------------------------------------------------------------------------------------------------------


class AgentDescription(Reply, frozen=True, kw_only=True):
    """What an agent is, and what it holds now; `worlds`: those that it leads, as core.scheduling.holders.HeldWorld.

    `held` tells how many slots each world has here, whoever leads it.
    """

    name: str
    pid: int
    host: str
    address: str
    num_slots: int
    free_slots: int
    has_gpus: bool
    worlds: list[dict[str, Any]]
    begun: list[str]  # worlds that were started, the newest last
    num_replicas: int
    num_runs: int
    wants: int = 0  # more ranks, that elastic runs which are led here could have
    is_warm: bool = True  # ranks start at once: what they need is imported
    is_leaving: bool = False  # it will be taken away, with its host
    stands_by: list[str]  # for these runs
    held: dict[str, int] = field(default_factory=dict)
    num_cores: int = 0  # of the host; 0 of an agent that does not tell
    reserved_cores: int = 0  # that its replicas have
    free_memory_bytes: int = 0  # of the host
    promised_bytes: int = 0  # of it, what its replicas may take still


class AgentResources(Reply, frozen=True, kw_only=True):
    """What an agent's host and its processes take; times are seconds since the epoch, `cpu` a share of 1.

    `devices`: [{index, name, uuid, memory_bytes, total_memory_bytes, utilization}], `processes`: [{pid, kind, world_id,
    rank, endpoint, replica_id, device, memory_bytes, gpu_memory_bytes, cpu}], each as far as it is known.
    """

    host: str
    t: float
    num_cores: int
    cpu: float
    memory_bytes: int
    total_memory_bytes: int
    devices: list[dict[str, Any]] = field(default_factory=list)
    processes: list[dict[str, Any]] = field(default_factory=list)


class WorldDescription(Reply, frozen=True, kw_only=True):
    """A world now; `ranks`: [{rank, local_rank, pid, host, device, state, rss}].

    `notes` say what new ranks lack, once, after a resize.
    """

    world_id: str
    world_size: int
    owner: str
    generation: int
    run_id: str
    ranks: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


class Submitted(Reply, frozen=True, kw_only=True):
    """The run goes on without whoever asked for it."""

    run_id: str


class Pulled(Reply, frozen=True, kw_only=True):
    """The payload is a pickled dict of variables."""


class NamesFound(Reply, frozen=True, kw_only=True):
    """Which of the names that were asked for are missing, the user's own variables, and those that are imported."""

    missing: list[str]
    own: list[str]
    imported: list[str]


class WorldStacks(Reply, frozen=True, kw_only=True):
    """What every rank is doing, as RankStacks or as seen from outside; `cells`: execution counts by their files."""

    ranks: dict[int, dict[str, Any]]
    cells: dict[str, int]


class WorldVariables(Reply, frozen=True, kw_only=True):
    """By rank: {"variables": rows as in RankVariables} or {"problem": why they are not told}."""

    ranks: dict[int, dict[str, Any]]


class ReplicaDescription(Reply, frozen=True, kw_only=True):
    """A replica's process now."""

    replica_id: str
    endpoint: str
    pid: int
    socket: str
    state: str
    exit_code: int | None
    log: str
    reason: str = ""  # why its agent has ended it


class ReplicaList(Reply, frozen=True, kw_only=True):
    """Of each replica what a ReplicaDescription says."""

    replicas: list[dict[str, Any]]


class Placement(Reply, frozen=True, kw_only=True):
    """Where ranks can be started: agents as in StartWorld, by the paths of whoever asked."""

    agents: list[dict[str, Any]]


class StandbyFound(Reply, frozen=True, kw_only=True):
    """A socket of another agent, "" when there is none."""

    address: str


class ClusterDescription(Reply, frozen=True, kw_only=True):
    """The fields of a cluster's record."""

    record: dict[str, Any]


# --- asked of an agent ----------------------------------------------------------------------------------------------


class Describe(Request[AgentDescription], frozen=True, kw_only=True):
    """What is this agent?"""


class DescribeResources(Request[AgentResources], frozen=True, kw_only=True):
    """What do this agent's host and its processes take now?"""


class StartWorld(Request[WorldDescription], frozen=True, kw_only=True):
    """Start ranks on `agents`: [{"home", "num_ranks", "host"}], the first is this one, the leader.

    `home` is the socket by which the leader reaches each of them from its own host. `num_threads` is of ranks that are
    started again.
    """

    world_id: str
    agents: list[dict[str, Any]]
    owner: str = ""
    cwd: str = ""
    lease_s: float = 900.0
    link_lease_s: float = 24.0  # ranks of another agent end when the leader has not heard it for so long
    env: dict[str, str] = field(default_factory=dict)
    num_threads: dict[int, int] = field(default_factory=dict)


class StopWorld(Request[Done], frozen=True, kw_only=True):
    """End every rank of a world."""

    world_id: str


class ReleaseWorld(Request[Done], frozen=True, kw_only=True):
    """Its notebook was shut down: the world ends `grace_s` after its last run, unless somebody uses it again."""

    world_id: str
    grace_s: float


class ResizeWorld(Request[WorldDescription], frozen=True, kw_only=True):
    """Have `num_ranks` ranks; more go to `agents`, as in StartWorld."""

    world_id: str
    num_ranks: int
    agents: list[dict[str, Any]] = field(default_factory=list)


class DescribeWorld(Request[WorldDescription], frozen=True, kw_only=True):
    """Describe a world; the connection that asks becomes one of its owners."""

    world_id: str


class Execute(Request[Submitted | CellEnded], frozen=True, kw_only=True):
    """Run a cell on ranks. To the agent: with the run's spec; to a rank: one rank's share of it.

    The agent answers a run in the background at once, and tells of the other ones to its end; a rank says CellEnded.

    `source` is the whole notebook cell; `code` the body; `line_offset` how many lines of the cell come before the body.
    `pull` names are pickled on `pull_rank` when the cell has ended; `save` names go to `model/` of the run's folder.
    The payload holds pickled variables to push first (empty when none).
    """

    world_id: str
    run_id: str
    name: str
    code: str
    source: str = ""
    filename: str = "<cell>"
    execution_count: int = 0
    line_offset: int = 0
    ranks: list[int] = field(default_factory=list)
    precision: str = ""
    plan: str = ""  # how the model is spread, as core.parallel.plan reads it; "" for ddp
    compress_gradients: str = ""
    balance: bool = False  # rows of a batch by the speed of each rank
    environment: dict[str, str] = field(default_factory=dict)  # variables that Accelerate reads, for this run alone
    save: list[str] = field(default_factory=list)
    pull: list[str] = field(default_factory=list)
    background: bool = False
    folder: str = ""
    agent: str = ""  # where the sender reaches the leading agent, for whoever wants to stop the run
    cluster: str = ""
    owner: str = ""
    spec: dict[str, Any] = field(default_factory=dict)  # what was asked for, as its record keeps it
    script: dict[str, Any] = field(default_factory=dict)  # of a script, not a cell: as core.spec.Script
    pushed: dict[str, str] = field(default_factory=dict)  # with the cell: {name: its literal, or ""}
    arguments: list[str] = field(default_factory=list)  # of a cell, as its sys.argv[1:]
    fresh: bool = False  # it finds what a new process would find
    trial: dict[str, Any] = field(default_factory=dict)  # of a sweep: as storage.search.study.RankTrial
    is_definition: bool = False  # imports, functions, constants: run again on a rank that replaces a dead one
    definitions: str = ""  # of a cell that is more than that: what of its code is run again
    makes: list[str] | None = None  # variables that it binds; None when its text does not tell
    timeout_s: float = 0.0
    asked: float = 0.0  # when somebody asked for it, in seconds since the epoch; a cluster was looked for since
    seed: int | None = None
    checkpoint_every: int = 0  # optimizer steps
    keep_checkpoints: int = 2
    max_restarts: int = 0
    elastic: str = ""  # MIN:MAX ranks
    reference_ranks: int = 0  # of an elastic run: how many it began with, whose global batch stays
    attempt: int = 0  # how often the run was restarted or resized before
    resume: dict[str, Any] = field(default_factory=dict)  # {"folder", "step"} of the checkpoint to be led back to
    left_out: list[list[int]] = field(default_factory=list)  # optimizer steps that change nothing: [first, last]
    hang_after_s: float = 10.0  # a rank that others wait for is called late after this, or later where that is normal


class Push(Request[Done], frozen=True, kw_only=True):
    """Set pickled variables (payload: a dict) on ranks (all when empty)."""

    world_id: str
    ranks: list[int] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # for the record of the next run: {name: its literal, or ""}


Replayed = Execute | Push  # on a rank that replaces a dead one


class Pull(Request[Pulled], frozen=True, kw_only=True):
    """Pickle variables of one rank."""

    world_id: str
    names: list[str]
    rank: int = 0


class Names(Request[NamesFound], frozen=True, kw_only=True):
    """Which of `names` does a rank not have, and which variables does it have?"""

    world_id: str
    names: list[str]
    rank: int = 0


class Subscribe(Request[Done], frozen=True, kw_only=True):
    """Follow a living run from now on: Journaled records and RunEnded come on this connection."""

    run_id: str


class StopRun(Request[Done], frozen=True, kw_only=True):
    """Stop a run; asked again while it is stopping, go to the next rung at once."""

    run_id: str


class CheckpointSaved(Reply, frozen=True, kw_only=True):
    """The step whose checkpoint is complete now."""

    step: int


class SaveCheckpoint(Request[CheckpointSaved], frozen=True, kw_only=True):
    """Have a checkpoint of the next step that all ranks of a run share; answered when it is complete."""

    run_id: str


class DumpStacks(Request[WorldStacks], frozen=True, kw_only=True):
    """What is every thread of every rank doing?"""

    world_id: str


class ListVariables(Request[WorldVariables], frozen=True, kw_only=True):
    """Which variables does the user have on every rank?"""

    world_id: str


class LaunchReplica(Request[ReplicaDescription], frozen=True, kw_only=True):
    """Start `python -m jupyter_llmcloud.inference` for an endpoint.

    `spec` is handed to it on standard input as one JSON line and holds its bearer token.
    """

    endpoint: str
    replica_id: str
    spec: dict[str, Any]


class EndReplica(Request[Done], frozen=True, kw_only=True):
    """End a replica (SIGTERM, then SIGKILL)."""

    replica_id: str


class DescribeReplicas(Request[ReplicaList], frozen=True, kw_only=True):
    """Which replicas have been started here, and not stopped on request?"""


class RenewLease(Request[Done], frozen=True, kw_only=True):
    """The owner is alive; one that `finds_capacity` answers PlaceRanks."""

    world_id: str = ""
    finds_capacity: bool = False


class Shutdown(Request[Done], frozen=True, kw_only=True):
    """End every rank, replica and the agent itself.

    Attributes:
        cluster_stays: other workers go on: a run that may go on elsewhere is saved and handed over first, as when the
            host is taken away.
    """

    cluster_stays: bool = False


# --- asked by an agent of the worker that holds it ---


class PlaceRanks(Request[Placement], frozen=True, kw_only=True):
    """Where can this agent start so many ranks? `at_once`: an agent that is coming up is not waited for.

    `at_least`: as many of them as there is room for will do, from so many on; 0: all or none. `without`: agents, by
    their keys, that are to have none.
    """

    num_ranks: int
    at_once: bool = False
    at_least: int = 0
    without: list[str] = field(default_factory=list)


class FindStandby(Request[StandbyFound], frozen=True, kw_only=True):
    """Which other agent could lead in this one's place?"""


# --- asked of a cluster's host process ------------------------------------------------------------------------------


class ScaleCluster(Request[ClusterDescription], frozen=True, kw_only=True):
    """Have this many workers; or between `minimum` and `maximum`, as the load asks."""

    workers: int = 0
    minimum: int = 0
    maximum: int = 0


class AdoptCluster(Request[ClusterDescription], frozen=True, kw_only=True):
    """The cluster belongs to this process from now on."""

    owner_pid: int
    owner_started: float


class StopCluster(Request[ClusterDescription], frozen=True, kw_only=True):
    """End the workers, their agents and all that runs on them."""


# --- told by an agent to those who follow a run ---------------------------------------------------------------------


class Journaled(Message, frozen=True, kw_only=True):
    """Records just written to a journal (`journal` is "logs" or "metrics")."""

    run_id: str
    rank: int
    journal: str
    records: list[dict[str, Any]]


class RankState(Message, frozen=True, kw_only=True):
    """A rank's state changed: starting, running, done, failed, stopped, exited."""

    run_id: str
    rank: int
    state: str
    detail: str = ""


class TimesTold(Message, frozen=True, kw_only=True):
    """Where the ranks spend their time, by rank and part of core.run.time_split.

    `shares` are of the last seconds, `seconds` of the run so far; `price` is of an hour of a rank, 0 for none.
    """

    run_id: str
    shares: dict[int, dict[str, float]]
    seconds: dict[int, dict[str, float]]
    price: float = 0.0


class RunEnded(Message, frozen=True, kw_only=True):
    """The run is over. `errors` holds the culprit first; the payload is what was pulled (a pickled dict)."""

    run_id: str
    state: str
    errors: list[dict[str, Any]] = field(default_factory=list)
    report: list[str] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)  # by rank and part of core.run.time_split
