"""What an agent and its ranks say to each other, and agents among themselves about ranks."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import field

from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rpc import Reply, Request


class Join(Message, frozen=True, kw_only=True):
    """Join the process group of a generation, of `world_size` ranks; answered by Joined.

    `store`: where the world's TCPStore is now, and `interface` the one to use, when they have changed. `env`: the
    variables by which a launcher tells a process its place among the others. `rank`: its number from now on.
    """

    generation: int
    world_size: int
    rank: int = -1  # -1: as before
    env: dict[str, str] = field(default_factory=dict)
    store: str = ""
    interface: str = ""


class Joined(Message, frozen=True, kw_only=True):
    """This rank is in the group of `generation`; `error` when it could not join."""

    generation: int
    error: str = ""


class Interrupt(Message, frozen=True, kw_only=True):
    """Raise KeyboardInterrupt in the main thread."""


class StepQuery(Message, frozen=True, kw_only=True):
    """Pause at the next step boundary and say which step you are in; `stops`: the run is about to be stopped."""

    stops: bool = True


class StepReply(Message, frozen=True, kw_only=True):
    """Steps finished so far."""

    step: int


class StopAt(Message, frozen=True, kw_only=True):
    """Raise KeyboardInterrupt when this many steps are finished (-1: go on, forget the pause)."""

    step: int


class SaveAt(Message, frozen=True, kw_only=True):
    """Go on, and save a checkpoint when this many steps are finished (-1: save none)."""

    step: int


class Preempted(Message, frozen=True, kw_only=True):
    """The place of all of us is being taken away: a SIGTERM is no reason to end yet."""


class SaveLastState(Message, frozen=True, kw_only=True):
    """The other ranks of an elastic run are lost with their agents: write what is held of the last iteration.

    `left`: the ranks that still run, all of which are told.
    """

    left: list[int]


class Release(Message, frozen=True, kw_only=True):
    """Break the group, so that whoever is blocked in a collective gets an error.

    `generation`: who is to join the group of this generation, or waits for others to, gives up.
    """

    generation: int = -1


class Exit(Message, frozen=True, kw_only=True):
    """Leave."""


class LogRecords(Message, frozen=True, kw_only=True):
    """Log records of a rank: {"kind": ..., ...} without seq."""

    records: list[dict[str, Any]]


class MetricRecords(Message, frozen=True, kw_only=True):
    """Metric and progress records of a rank, without seq."""

    records: list[dict[str, Any]]


class RankTimes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Seconds of an attempt's cell: computing, blocked in collectives, in data loaders, in checkpoints.

    `points`: [optimizer steps, collectives since then, seconds blocked until then], since it was told last.
    """

    attempt: int = 0
    spent: list[float] = []
    points: list[tuple[int, int, float]] = []


class CellEnded(Reply, frozen=True, kw_only=True):
    """A rank has finished its cell. `error`: {ename, evalue, traceback, collateral, step}; payload: what was pulled."""

    run_id: str
    error: dict[str, Any] | None = None
    interrupted: bool = False
    in_group: bool = True
    artifacts: dict[str, str] = field(default_factory=dict)
    groups: dict[str, list[Any]] = field(default_factory=dict)  # as in Heartbeat
    times: RankTimes = RankTimes()


class Heartbeat(Message, frozen=True, kw_only=True):
    """What a rank's side thread sees while a cell runs; the fields are those of core.hang.Sample.

    `groups`: name -> [ranks, collectives begun, collectives finished], with no ranks for all of the world;
    `rss`, and `available` beside it before a limit is met, in bytes; `device_memory`: the same two of its GPU.
    """

    run_id: str
    phase: str = "unknown"
    op: str = ""
    groups: dict[str, list[Any]] = field(default_factory=dict)
    step: int = 0
    place: str = ""
    doing: str = ""
    still_s: float = 0.0
    working: bool = False
    rss: int = 0
    available: int = 0
    device_memory: tuple[int, int] = (0, 0)
    times: RankTimes = RankTimes()


class ProbeRank(Message, frozen=True, kw_only=True):
    """Asked of a following agent: look at a rank's process from outside; answered by RankProbed from that rank.

    `dump`: have it write its stacks as well, which works without its interpreter's lock.
    """

    world_id: str
    rank: int
    dump: bool = False


class RankProbed(Message, frozen=True, kw_only=True):
    """A rank's process as its agent sees it: state as in /proc ("" when gone), processor seconds, stacks."""

    state: str = ""
    cpu_s: float = 0.0
    busy: bool = False
    dump: str = ""
    dumped: bool = False


class RankStacks(Reply, frozen=True, kw_only=True):
    """What the threads of a rank are doing: lines for the main one, and for others by name.

    `op`: the collective that the main thread is blocked in, "" for none.
    """

    main: list[str]
    threads: dict[str, list[str]]
    op: str = ""


class DumpRankStacks(Request[RankStacks], frozen=True, kw_only=True):
    """Asked of a rank: what is every thread doing?"""


class RankVariables(Reply, frozen=True, kw_only=True):
    """The user's variables of a rank: rows of {"name", "type", "text", "num_bytes", "role"}."""

    variables: list[dict[str, Any]]


class ListRankVariables(Request[RankVariables], frozen=True, kw_only=True):
    """Asked of a rank: which variables does the user have there? Answered also while a cell runs."""


class CheckpointPart(Message, frozen=True, kw_only=True):
    """A rank's part of a checkpoint is written; or `error` says why not, `not_finite` what must not be kept.

    `files` holds name -> {"size", "sha256"}; `resumable`: the run can go on from here; `serial` counts the
    checkpoints of this step in an attempt. `left`: it is one that these ranks write when the others are lost.
    `parameters`, `buffers` and `rng` are digests by
    name, as in core.run.divergence. `cpu_s`: processor time that it has cost the rank.
    """

    run_id: str
    step: int
    attempt: int = 0
    serial: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = ""
    not_finite: str = ""
    metric: float | None = None
    mode: str = "min"
    resumable: bool = True
    cpu_s: float = 0.0
    left: list[int] = field(default_factory=list)
    parameters: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    rng: dict[str, str] = field(default_factory=dict)


class LeaseUntil(Message, frozen=True, kw_only=True):
    """This rank ends at this time of its host's monotonic clock, unless it is told a later one; None: it does not."""

    until: float | None


class FollowAccepted(Reply, frozen=True, kw_only=True):
    """The link is taken up; `received` as in core.link.Stamp."""

    received: int


class Follow(Request[FollowAccepted], frozen=True, kw_only=True):
    """Asked of an agent by a leader, the first time or on another connection: speak with me by a core.link.Link.

    Refused as NotFound when the link has ended there and its ranks with it. `direct`: the leader is
    on this host, so that the end of the connection is the leader's own.
    """

    link_id: str
    lease_s: float
    received: int = 0
    direct: bool = False


class LinkMessage(Message, frozen=True, kw_only=True):
    """A word of a link (payload: the inner frame, or nothing) with the fields of its core.link.Stamp."""

    number: int
    received: int
    at: float
    echo: float


class ToRank(Message, frozen=True, kw_only=True):
    """A leader's message to a rank that another agent hosts (payload: the inner frame)."""

    world_id: str
    rank: int


class FromRank(Message, frozen=True, kw_only=True):
    """A message of a rank to the leader that follows it from another host (payload: the inner frame)."""

    world_id: str
    rank: int


class RanksHosted(Reply, frozen=True, kw_only=True):
    """Ranks were forked on this host: their pids and numbers of threads. `address` is the agent's socket there."""

    host: str
    pids: dict[int, int]
    num_threads: dict[int, int]
    address: str = ""


class HostRanks(Request[RanksHosted], frozen=True, kw_only=True):
    """Asked of a following agent: fork these ranks of a world.

    `local_ranks` are their places on that agent; asked again for some of them, those are replaced. `num_threads` is of
    those that were somewhere else before: sums are rounded alike only on as many threads.
    """

    world_id: str
    ranks: list[int]
    local_ranks: list[int]
    local_world_size: int
    world_size: int
    store: str
    cwd: str = ""
    env: dict[str, str] = field(default_factory=dict)
    num_threads: dict[int, int] = field(default_factory=dict)


class AgentLeaves(Message, frozen=True, kw_only=True):
    """Told by an agent to the leaders of the ranks that it hosts: it ends as soon as they have let them go."""


class StandBy(Message, frozen=True, kw_only=True):
    """Said by a leader: when I have gone, lead this run in my place, as its leader of the next term.

    `folder` is the run's, "" when it has ended. `wait_s`: for so long after my end other hosts may have ranks of it.
    `heir` is what this one is called in the files of later terms of mine. It stands by in those that name it, also when
    it has not heard of them.
    """

    folder: str
    term: int = 0
    wait_s: float = 0.0
    heir: str = ""


class RenumberRanks(Message, frozen=True, kw_only=True):
    """Told to a following agent: its ranks that stay have new numbers, {old: new}."""

    world_id: str
    numbers: dict[int, int]


class KillRank(Message, frozen=True, kw_only=True):
    """Asked of a following agent: SIGKILL."""

    world_id: str
    rank: int


class RankExited(Message, frozen=True, kw_only=True):
    """A rank's process has ended: `status` as from os.waitstatus_to_exitcode."""

    world_id: str
    rank: int
    status: int
    evidence: str = ""


# --- asked of a zygote, and told by it ------------------------------------------------------------------------------


class Forked(Reply, frozen=True, kw_only=True):
    """The process has begun; `name` is that of the request."""

    name: str
    pid: int


class ForkRank(Request[Forked], frozen=True, kw_only=True):
    """Fork a rank. With it come the descriptors of its socket, stdout, stderr and ring of metrics.

    `name` is said again when it has ended. `until`: as LiveUntil. `sockets`: a folder that is made for those of
    `multiprocessing`, of the rank and its children, and removed by whoever asks for the rank.
    """

    name: str
    rank: int
    world_size: int
    store: str
    backend: str
    gpu: bool = False
    until: float | None = None
    cwd: str = ""
    sockets: str = ""
    env: dict[str, str] = field(default_factory=dict)


class ForkStore(Request[Forked], frozen=True, kw_only=True):
    """Fork a world's TCPStore. With it come the descriptors of its control socket, stdout and stderr."""

    name: str
    host: str
    port: int
    env: dict[str, str] = field(default_factory=dict)


class ForkProgram(Request[Forked], frozen=True, kw_only=True):
    """Fork a process that is `python -m MODULE` with this environment alone, its libraries imported already.

    With it come the descriptors of its standard input, output and error.
    """

    name: str
    module: str
    env: dict[str, str]


class ZygoteReady(Message, frozen=True, kw_only=True):
    """Everything is imported: from now on a fork takes no time."""


class ForkEnded(Message, frozen=True, kw_only=True):
    """A forked process has ended: `status` as from os.waitstatus_to_exitcode."""

    name: str
    status: int
