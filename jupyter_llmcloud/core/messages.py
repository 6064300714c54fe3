"""The messages that cross processes: small frozen types, one tagged union, and their bytes.

A frame is `u32 header length, u32 payload length, header, payload` (big endian). The header is JSON
`{"type": <class name>, ...fields}`; the payload is what only the two ends understand (a pickle, never opened between).
Encoding and decoding are pure: who owns a socket feeds the `Decoder`.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

_HEAD = struct.Struct("!II")
MAX_HEADER = 64 << 20
MAX_PAYLOAD = (1 << 32) - 1


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base of all messages. `reply_to` matches an answer to its request; `payload` travels as raw bytes."""

    kinds: ClassVar[dict[str, type[Message]]] = {}
    reply_to: int = 0
    payload: bytes = b""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Message.kinds[cls.__name__] = cls


def encode(message: Message) -> bytes:
    """The frame of a message."""
    body: dict[str, Any] = {"type": type(message).__name__}
    for item in fields(message):
        if item.name != "payload":
            value = getattr(message, item.name)
            if value != item.default:
                body[item.name] = value
    header = json.dumps(body, separators=(",", ":")).encode()
    return _HEAD.pack(len(header), len(message.payload)) + header + message.payload


class Decoder:
    """Bytes in, messages out; keeps what is not complete yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Every message completed by `data`. Raises ValueError on a frame that cannot be ours."""
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while len(self._buffer) - start >= _HEAD.size:
            header_size, payload_size = _HEAD.unpack_from(self._buffer, start)
            if header_size > MAX_HEADER:
                raise ValueError(f"a frame header of {header_size} bytes: the other end does not speak our protocol")
            body = start + _HEAD.size
            end = body + header_size + payload_size
            if len(self._buffer) < end:
                break
            header = bytes(self._buffer[body : body + header_size])
            payload = bytes(self._buffer[body + header_size : end])
            messages.append(_decode(header, payload))
            start = end
        del self._buffer[:start]
        return messages


def _decode(header: bytes, payload: bytes) -> Message:
    body = json.loads(header)
    kind = Message.kinds.get(str(body.get("type"))) if isinstance(body, dict) else None
    if kind is None:
        raise ValueError("an unknown message: the two ends run different versions of jupyter-llmcloud")
    known = {item.name for item in fields(kind)}
    try:
        return kind(**{**{key: value for key, value in body.items() if key in known}, "payload": payload})
    except TypeError as error:
        raise ValueError(f"a message that is not complete: {error}") from None


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
    """What is this agent? -> Done(values: name, pid, host, num_slots, devices, free_slots, worlds, replicas)."""


@dataclass(frozen=True, kw_only=True)
class StartWorld(Message):
    """Start ranks on `agents`: [{"home", "num_ranks", "host"}], the first is this one, the leader.

    `home` is the socket by which the leader reaches each of them from its own host.
    """

    world_id: str
    agents: list[dict[str, Any]]
    owner: str = ""
    cwd: str = ""
    lease_s: float = 900.0
    env: dict[str, str] = field(default_factory=dict)


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
    options: dict[str, Any] = field(default_factory=dict)
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
    """The owner is alive."""

    world_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Shutdown(Message):
    """End every rank, replica and the agent itself."""


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


# --- between an agent and its ranks ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Join(Message):
    """Join the process group of a generation, of `world_size` ranks; answered by Joined."""

    generation: int
    world_size: int


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
    """Break this rank's collectives: whoever is blocked in one gets an error."""


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

    `files` holds name -> {"size", "sha256"}; `resumable`: the run can go on from here.
    """

    run_id: str
    step: int
    attempt: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = ""
    not_finite: str = ""
    metric: float | None = None
    mode: str = "min"
    resumable: bool = True


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
    """Asked of a following agent: fork these ranks of a world. -> Done(values: pids, host).

    `local_ranks` are their places on that agent; asked again for some of them, those are replaced.
    """

    world_id: str
    ranks: list[int]
    local_ranks: list[int]
    local_world_size: int
    world_size: int
    store: str
    cwd: str = ""
    env: dict[str, str] = field(default_factory=dict)


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
