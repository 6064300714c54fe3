"""The error tree: every error a user can meet, drawn where it is defined.

LLMCloudError
├── UsageError          what was typed is not possible: the option, the value seen, what is allowed
├── NotFound            no such run, endpoint, cluster, key or variable
├── NameTaken           the name belongs to something that is alive
├── CapacityError       more ranks or replicas asked for than the cluster can hold
│   └── Busy            it could hold them, but others hold the slots now
├── ModelError          a folder that holds no model which can be served
├── ConnectionLost      a process of ours cannot be reached any more
├── ServerError         the Jupyter server answered with an error
├── WorldError          a world could not be started or has lost its ranks
└── RankError           a cell failed on a rank (drawn with that rank's own traceback)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class LLMCloudError(Exception):
    """Base of every error raised on purpose; its message says what happened, the value seen, what to do."""

    def _render_traceback_(self) -> list[str]:
        # A message for the user, not a bug report: IPython shows this in place of our own frames.
        return [f"{type(self).__name__}: {self}"]


class UsageError(LLMCloudError):
    """What was typed is not possible."""


class NotFound(LLMCloudError):
    """No such run, endpoint, cluster, key or variable."""


class NameTaken(LLMCloudError):
    """The name belongs to something that is alive."""


class CapacityError(LLMCloudError):
    """More ranks or replicas were asked for than the cluster can hold."""


class Busy(CapacityError):
    """The cluster could hold what was asked for, but not now: others hold the slots."""


class ModelError(LLMCloudError):
    """A folder that holds no model which can be served."""


class ConnectionLost(LLMCloudError):
    """A process of ours cannot be reached any more."""


class ServerError(LLMCloudError):
    """The Jupyter server answered with an error."""


class WorldError(LLMCloudError):
    """A world could not be started, or has lost its ranks."""


class RankError(LLMCloudError):
    """A `%%distribute` cell failed on at least one rank.

    Attributes:
        rank: the rank that failed first (the culprit).
        ename, evalue: type name and message of its exception.
        traceback: the lines of its traceback, as IPython would draw them.
        ranks: every rank that failed with the same error.
        report: what happened to the other ranks, one line each.
        run_id: the run that failed.
        place: the notebook line that failed on the culprit; locals: its local variables as short texts, by name.
    """

    def __init__(
        self,
        rank: int,
        ename: str,
        evalue: str,
        traceback: Sequence[str] = (),
        *,
        ranks: Sequence[int] = (),
        report: Sequence[str] = (),
        run_id: str = "",
        place: str = "",
        local_variables: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"rank {rank}: {ename}: {evalue}")
        self.rank = rank
        self.ename = ename
        self.evalue = evalue
        self.traceback = list(traceback)
        self.ranks = list(ranks) or [rank]
        self.report = list(report)
        self.run_id = run_id
        self.place = place
        self.locals = dict(local_variables or {})

    def _render_traceback_(self) -> list[str]:
        lines = list(self.traceback) or [f"{self.ename}: {self.evalue}"]
        return [*lines, "", f"RankError: the cell failed on rank {self.rank}.", *self.report]
