"""What is asked of an agent or a cluster's host process, how it is answered, and what followers of a run are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.protocol.frames import Message

# --- any request may be refused -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Done(Message):
    """The request was carried out; `values` is its answer."""

    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Refused(Message):
    """The request was not carried out. `error` is the name of a class in `errors`."""

    error: str = "LLMCloudError"
    reason: str = ""


# --- asked of an agent ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Describe(Message):
    """What is this agent? -> Done(values: name, pid, host, num_slots, free_slots, worlds, num_runs, stands_by, ...)."""


@dataclass(frozen=True, kw_only=True)
class StartWorld(Message):
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
    num_threads: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StopWorld(Message):
    """End every rank of a world."""

    world_id: str


@dataclass(frozen=True, kw_only=True)
class ResizeWorld(Message):
    """Have `num_ranks` ranks; more go to `agents`, as in StartWorld. -> Done(values: as DescribeWorld)."""

    world_id: str
    num_ranks: int
    agents: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class DescribeWorld(Message):
    """-> Done(values: ranks: [{rank, local_rank, pid, host, device, state, rss}], generation, run_id)."""

    world_id: str


@dataclass(frozen=True, kw_only=True)
class Execute(Message):
    """Run a cell on ranks. To the agent: with the run's spec; to a rank: one rank's share of it.

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
    save: list[str] = field(default_factory=list)
    pull: list[str] = field(default_factory=list)
    background: bool = False
    folder: str = ""
    agent: str = ""  # where the sender reaches the leading agent, for whoever wants to stop the run
    cluster: str = ""
    owner: str = ""
    spec: dict[str, Any] = field(default_factory=dict)  # what was asked for, as its record keeps it
    script: dict[str, Any] = field(default_factory=dict)  # of a script, not a cell: as core.spec.Script
    is_definition: bool = False  # imports, functions, constants: run again on a rank that replaces a dead one
    timeout_s: float = 0.0
    seed: int | None = None
    checkpoint_every: int = 0  # optimizer steps
    keep_checkpoints: int = 2
    max_restarts: int = 0
    attempt: int = 0  # how often the run was restarted before
    resume: dict[str, Any] = field(default_factory=dict)  # {"folder", "step"} of the checkpoint to be led back to
    hang_after_s: float = 10.0  # a rank that others wait for is called late after this, or later where that is normal


@dataclass(frozen=True, kw_only=True)
class Push(Message):
    """Set pickled variables (payload: a dict) on ranks (all when empty)."""

    world_id: str
    ranks: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Pull(Message):
    """Pickle variables of one rank -> Done(payload: a dict)."""

    world_id: str
    names: list[str]
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Names(Message):
    """Which of `names` does a rank not have? -> Done(values: missing, own: the user's own variables)."""

    world_id: str
    names: list[str]
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Subscribe(Message):
    """Follow a living run from now on: Journaled records and RunEnded come on this connection."""

    run_id: str


@dataclass(frozen=True, kw_only=True)
class StopRun(Message):
    """Stop a run; asked again while it is stopping, go to the next rung at once."""

    run_id: str


@dataclass(frozen=True, kw_only=True)
class StartReplica(Message):
    """Start `python -m jupyter_llmcloud.inference` for an endpoint -> Done(values: pid, socket, log).

    `spec` is handed to it on standard input as one JSON line and holds its bearer token.
    """

    endpoint: str
    replica_id: str
    spec: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StopReplica(Message):
    """End a replica (SIGTERM, then SIGKILL)."""

    replica_id: str


@dataclass(frozen=True, kw_only=True)
class DescribeReplicas(Message):
    """-> Done(values: replicas: [{replica_id, endpoint, pid, socket, state, exit_code, log}])."""


@dataclass(frozen=True, kw_only=True)
class RenewLease(Message):
    """The owner is alive; one that `finds_room` answers FindRoom."""

    world_id: str = ""
    finds_room: bool = False


@dataclass(frozen=True, kw_only=True)
class Shutdown(Message):
    """End every rank, replica and the agent itself."""


# --- asked by an agent of the worker that holds it ---


@dataclass(frozen=True, kw_only=True)
class FindRoom(Message):
    """Where can this agent start so many ranks? -> Done(values: agents: as in StartWorld, by this agent's paths)."""

    num_ranks: int


@dataclass(frozen=True, kw_only=True)
class FindStandBy(Message):
    """Which other agent could lead in this one's place? -> Done(values: address, "" when there is none)."""


# --- asked of a cluster's host process ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScaleCluster(Message):
    """Have this many workers; or between `minimum` and `maximum`, as the load asks."""

    workers: int = 0
    minimum: int = 0
    maximum: int = 0


@dataclass(frozen=True, kw_only=True)
class AdoptCluster(Message):
    """The cluster belongs to this process from now on."""

    owner_pid: int
    owner_started: float


@dataclass(frozen=True, kw_only=True)
class StopCluster(Message):
    """End the workers, their agents and all that runs on them."""


# --- told by an agent to those who follow a run ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Journaled(Message):
    """Records just written to a journal (`journal` is "logs" or "metrics")."""

    run_id: str
    rank: int
    journal: str
    records: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RankState(Message):
    """A rank's state changed: starting, running, done, failed, stopped, exited."""

    run_id: str
    rank: int
    state: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class RunEnded(Message):
    """The run is over. `errors` holds the culprit first; the payload is what was pulled (a pickled dict)."""

    run_id: str
    state: str
    errors: list[dict[str, Any]] = field(default_factory=list)
    report: list[str] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
