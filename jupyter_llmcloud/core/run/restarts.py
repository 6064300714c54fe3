"""Whether a run that broke is executed again, as rules: what happened in, a decision out.

A rank or a loader's worker that died, or a group that fell apart, is nobody's mistake: the run is executed again while
it has restarts left, at once the first time and later and later while it makes no progress. An error of the script ends
the run: restarts are not for that. A cell that fails while it is being led back to its resume point cannot be led
there: from then on it is executed from its start.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 60.0
MAX_REASON = 200  # characters
OUT_OF_MEMORY = "RankOutOfMemory"
_NO_MEMORY = (OUT_OF_MEMORY, "OutOfMemoryError", "CUDAOutOfMemoryError", "MemoryError")
_WORKER_DIED = re.compile(r"DataLoader worker \(pid[^)]*\)*[\d, ]*\)? (is killed by signal|exited unexpectedly)")


@dataclass(frozen=True)
class AttemptFailure:
    """An attempt has ended badly.

    Attributes:
        kind: "death" a process has gone, "leader" the agent that led the run has, "echo" only collective errors,
            "error" the cell raised.
        rank: the culprit.
        ename: type of the error.
        step: optimizer steps finished by then.
        replaying: the cell had not reached its resume point yet.
        reason: what the error says.
        is_membership: the world has lost members, with an agent or a host; nothing is wrong with the run.
        is_announced: their place was taken away by a batch system or a cloud, which had said so before.
    """

    kind: str
    rank: int | None = None
    ename: str = ""
    step: int = 0
    replaying: bool = False
    reason: str = ""
    is_membership: bool = False
    is_announced: bool = False

    def is_too_large_for(self, num_ranks: int, reference: int) -> bool:
        """Whether the parts of a batch were too large for so few ranks; the run began with `reference` of them."""
        return self.ename in _NO_MEMORY and num_ranks < reference

    @property
    def message(self) -> str:
        """What happened, for a note."""
        if self.kind == "leader":
            return "the agent that led the run was lost"
        who = f"rank {self.rank}" if self.rank is not None else "the group"
        lost = "was killed" if self.ename == "RankKilled" else "was lost"
        what = {"death": lost, "echo": "lost its connection", "error": f"raised {self.ename}"}[self.kind]
        reason = self.reason.partition("\n")[0].rstrip(".")[:MAX_REASON]
        why = f" ({reason})" if self.kind == "error" and reason else ""
        return f"{who} {what} at step {self.step}{why}"


def kind_of(died: bool, collateral: bool, evalue: str) -> str:
    """The `kind` of Broken for the culprit of an attempt: its process has gone, or what its error says."""
    if died or _WORKER_DIED.search(evalue):
        return "death"
    return "echo" if collateral else "error"


@dataclass(frozen=True)
class Retry:
    """Execute the run again, the `number`-th time, after `delay_s`; `from_start`: without a checkpoint.

    `is_resize`: since the members of its world change, which uses up no restart. `is_rollback`: nor does this, to a
    checkpoint from before something went wrong.
    """

    number: int
    delay_s: float
    from_start: bool = False
    is_resize: bool = False
    is_rollback: bool = False


@dataclass(frozen=True)
class GiveUp:
    """The run has failed; `why` it is not executed again ("" when that was never asked for)."""

    why: str = ""


@dataclass
class RestartPolicy:
    """The restarts of one run; `is_elastic`: a change of its members is none."""

    max_restarts: int = 0
    num_restarts: int = 0
    num_resizes: int = 0
    is_elastic: bool = False
    from_start: bool = False
    num_rollbacks: int = 0
    _num_stuck: int = 0
    _out_of_memory: bool = False
    _furthest: int = -1

    def handle(self, event: AttemptFailure) -> Retry | GiveUp:
        """What to do about a broken attempt."""
        if self.is_elastic and event.is_membership:
            return self.resized()
        if self.max_restarts <= 0:
            return GiveUp()
        if event.is_announced:
            return self.resized()
        if refusal := self._refusal(event):
            return GiveUp(refusal)
        if self.num_restarts >= self.max_restarts:
            return GiveUp(f"all {self.max_restarts} restarts are used up.")
        self._note_progress(event)
        self.num_restarts += 1
        return Retry(self._number, self._delay(), self.from_start)

    def resized(self) -> Retry:
        """The members of its world change, which is nobody's failure."""
        self.num_resizes += 1
        return Retry(self._number, 0.0, self.from_start, is_resize=True)

    def rolled_back(self) -> Retry:
        """It goes back to before something that a detector has found."""
        self.num_rollbacks += 1
        return Retry(self._number, 0.0, self.from_start, is_rollback=True)

    @property
    def _number(self) -> int:
        return self.num_restarts + self.num_resizes + self.num_rollbacks

    def _refusal(self, event: AttemptFailure) -> str:
        if event.ename == OUT_OF_MEMORY:
            if self._out_of_memory:
                return "the machine ran out of memory again."
            self._out_of_memory = True
        if event.kind != "error":
            return ""
        if event.replaying:
            if self.from_start:
                return f"{event.ename} came again when the cell was executed from its start."
            self.from_start = True
            return ""
        return f"{event.ename} is an error of the script; restarts are for ranks, agents and hosts that are lost."

    def _note_progress(self, event: AttemptFailure) -> None:
        if event.step > self._furthest:
            self._furthest, self._num_stuck = event.step, 0
        else:
            self._num_stuck += 1

    def _delay(self) -> float:
        if self._num_stuck == 0:
            return 0.0
        return float(min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (self._num_stuck - 1)))
