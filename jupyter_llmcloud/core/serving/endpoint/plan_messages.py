"""What the plan of an endpoint is told, and what it says: events and instructions."""

from __future__ import annotations

from dataclasses import dataclass

from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.core.tick import Tick

# --- events: what was observed, or is wanted from now on ------------------------------------------------------------


@dataclass(frozen=True)
class Desired:
    """The revisions that shall be served from now on; none stops the endpoint."""

    revisions: tuple[Revision, ...] = ()


@dataclass(frozen=True)
class Resumed:
    """A server takes up the endpoint of an earlier one: what shall be served, and replicas that may live still.

    Attributes:
        replicas: the revision of each replica, by its number.
    """

    revisions: tuple[Revision, ...]
    replicas: dict[int, int]


@dataclass(frozen=True)
class Started:
    """The process of a replica runs; it loads its model."""

    replica: int


@dataclass(frozen=True)
class Probed:
    """What a replica said of itself: ready, loading, failed, silent (no answer in time) or unreachable."""

    replica: int
    health: str
    reason: str = ""


@dataclass(frozen=True)
class ProcessAlive:
    """The agent of a replica that does not answer yet says that its process lives."""

    replica: int


@dataclass(frozen=True)
class Lost:
    """A replica could not be started, or its process has gone. `lasting`: another one would end in the same way."""

    replica: int
    reason: str
    lasting: bool = False


@dataclass(frozen=True)
class NoRoom:
    """There is no room for a replica now: it is tried again, and no failure."""

    replica: int
    reason: str


@dataclass(frozen=True)
class Reloaded:
    """A replica has the weights of another revision now; `refused` says why it has kept those that it had."""

    replica: int
    revision: int
    refused: str = ""


@dataclass(frozen=True)
class RevisionFailed:
    """A revision does not do what the others do: it gets no requests any more."""

    revision: int
    reason: str


@dataclass(frozen=True)
class Suspected:
    """A request could not reach a replica."""

    replica: int


@dataclass(frozen=True)
class Idle:
    """A draining replica has answered its last request."""

    replica: int


@dataclass(frozen=True)
class Stopped:
    """Nothing is left of a replica."""

    replica: int


Event = (
    Desired
    | Resumed
    | Started
    | Probed
    | ProcessAlive
    | Lost
    | NoRoom
    | Reloaded
    | RevisionFailed
    | Suspected
    | Idle
    | Stopped
    | Tick
)


# --- instructions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartReplica:
    """Start a process for a revision: `Started` or `Lost` follows."""

    replica: int
    revision: Revision


@dataclass(frozen=True)
class Probe:
    """Ask a replica how it is: `Probed` follows."""

    replica: int


@dataclass(frozen=True)
class AskAgent:
    """Ask the agent of a starting replica whether the process lives: `ProcessAlive` or `Lost` follows."""

    replica: int


@dataclass(frozen=True)
class ReloadReplica:
    """Have a replica load the weights of a revision between two steps: `Reloaded` or `Lost` follows."""

    replica: int
    revision: Revision


@dataclass(frozen=True)
class Withdraw:
    """A revision has failed while another one serves: go back to that one. `Desired` follows."""

    revision: int
    reason: str


@dataclass(frozen=True)
class Drain:
    """Let a replica finish what it answers: `Idle` follows."""

    replica: int


@dataclass(frozen=True)
class StopReplica:
    """End a replica, whatever it does; requests it still answers are told the reason. `Stopped` follows."""

    replica: int
    reason: str


@dataclass(frozen=True)
class Route:
    """New requests go to these replicas: their weight by their number."""

    weights: dict[int, int]


@dataclass(frozen=True)
class MarkState:
    """The endpoint has another state, or another reason for it."""

    state: str
    reason: str = ""


Instruction = StartReplica | ReloadReplica | Withdraw | Probe | AskAgent | Drain | StopReplica | Route | MarkState
