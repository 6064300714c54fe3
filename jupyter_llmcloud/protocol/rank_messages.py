"""What an agent and its ranks say to each other, and agents among themselves about ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.protocol.frames import Message


@dataclass(frozen=True, kw_only=True)
class Join(Message):
    """Join the process group of a generation, of `world_size` ranks; answered by Joined.

    `store`: where the world's TCPStore is now, and `interface` the one to use, when they have changed.
    """

    generation: int
    world_size: int
    store: str = ""
    interface: str = ""


@dataclass(frozen=True, kw_only=True)
class Joined(Message):
    """This rank is in the group of `generation`; `error` when it could not join."""

    generation: int
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Interrupt(Message):
    """Raise KeyboardInterrupt in the main thread."""


@dataclass(frozen=True, kw_only=True)
class StepAsked(Message):
    """Pause at the next step boundary and say which step you are in."""


@dataclass(frozen=True, kw_only=True)
class StepTold(Message):
    """Steps finished so far."""

    step: int


@dataclass(frozen=True, kw_only=True)
class StopAt(Message):
    """Raise KeyboardInterrupt when this many steps are finished (-1: go on, forget the pause)."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Release(Message):
    """Break the group, so that whoever is blocked in a collective gets an error.

    `generation`: who is to join the group of this generation, or waits for others to, gives up.
    """

    generation: int = -1


@dataclass(frozen=True, kw_only=True)
class Exit(Message):
    """Leave."""


@dataclass(frozen=True, kw_only=True)
class Printed(Message):
    """Log records of a rank: {"kind": ..., ...} without seq."""

    records: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Measured(Message):
    """Metric and progress records of a rank, without seq."""

    records: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class CellEnded(Message):
    """A rank has finished its cell. `error`: {ename, evalue, traceback, collateral, step}; payload: what was pulled."""

    run_id: str
    error: dict[str, Any] | None = None
    interrupted: bool = False
    in_group: bool = True
    artifacts: dict[str, str] = field(default_factory=dict)
    groups: dict[str, list[Any]] = field(default_factory=dict)  # as in Heartbeat


@dataclass(frozen=True, kw_only=True)
class Heartbeat(Message):
    """What a rank's side thread sees while a cell runs; the fields are those of core.hang.Sample.

    `groups`: name -> [ranks, collectives begun, collectives finished]; `rss` in bytes.
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


@dataclass(frozen=True, kw_only=True)
class LookAtRank(Message):
    """Asked of a following agent: look at a rank's process from outside; answered by RankLooked from that rank.

    `dump`: have it write its stacks as well, which works without its interpreter's lock.
    """

    world_id: str
    rank: int
    dump: bool = False


@dataclass(frozen=True, kw_only=True)
class RankLooked(Message):
    """A rank's process as its agent sees it: state as in /proc ("" when gone), processor seconds, stacks."""

    state: str = ""
    cpu_s: float = 0.0
    busy: bool = False
    dump: str = ""
    dumped: bool = False


@dataclass(frozen=True, kw_only=True)
class DumpStacks(Message):
    """What is every thread doing? To an agent: -> Done(values: ranks: {rank: ...}); to a rank: -> Done(values)."""

    world_id: str


@dataclass(frozen=True, kw_only=True)
class CheckpointPart(Message):
    """A rank's part of a checkpoint is written; or `error` says why not, `not_finite` what must not be kept.

    `files` holds name -> {"size", "sha256"}; `resumable`: the run can go on from here; `serial` counts the
    checkpoints of an attempt, of which several may be of one step.
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


@dataclass(frozen=True, kw_only=True)
class LiveUntil(Message):
    """This rank ends at this time of its host's monotonic clock, unless it is told a later one; None: it does not."""

    until: float | None


@dataclass(frozen=True, kw_only=True)
class Follow(Message):
    """Asked of an agent by a leader, the first time or on another connection: speak with me by a core.link.Link.

    -> Done(values: received), or Refused when the link has ended there and its ranks with it. `direct`: the leader is
    on this host, so that the end of the connection is the leader's own.
    """

    link_id: str
    lease_s: float
    received: int = 0
    direct: bool = False


@dataclass(frozen=True, kw_only=True)
class Said(Message):
    """A word of a link (payload: the inner frame, or nothing) with the fields of its core.link.Stamp."""

    number: int
    received: int
    at: float
    echo: float


@dataclass(frozen=True, kw_only=True)
class ToRank(Message):
    """A leader's message to a rank that another agent hosts (payload: the inner frame)."""

    world_id: str
    rank: int


@dataclass(frozen=True, kw_only=True)
class FromRank(Message):
    """A message of a rank to the leader that follows it from another host (payload: the inner frame)."""

    world_id: str
    rank: int


@dataclass(frozen=True, kw_only=True)
class HostRanks(Message):
    """Asked of a following agent: fork these ranks of a world. -> Done(values: pids, host, num_threads).

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
    num_threads: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StandBy(Message):
    """Said by a leader: when I have gone, lead this run in my place, as its leader of the next term.

    `folder` is the run's, "" when it has ended. `wait_s`: for so long after my end other hosts may have ranks of it.
    """

    folder: str
    term: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class KillRank(Message):
    """Asked of a following agent: SIGKILL."""

    world_id: str
    rank: int


@dataclass(frozen=True, kw_only=True)
class RankExited(Message):
    """A rank's process has ended: `status` as from os.waitstatus_to_exitcode."""

    world_id: str
    rank: int
    status: int
    evidence: str = ""
