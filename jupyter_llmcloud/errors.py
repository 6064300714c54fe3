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
├── ProtocolError       two processes of ours do not understand each other, most often by different versions
├── InternalError       a process of ours failed in a way that nobody foresaw: its log has the traceback
├── WorldError          a world could not be started or has lost its ranks
├── SweepFailed         a sweep of which nothing came: its message is the first error
└── RankError           a cell failed on a rank (drawn with that rank's own traceback)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar


class LLMCloudError(Exception):
    """Base of every error raised on purpose; its message says what happened, the value seen, what to do.

    Attributes:
        code: names the class to other processes, and to users of the REST API. It stays when the class is renamed.
        by_code: every class that has a code of its own.
        shown: how a notebook shows a message, which is saved with it.
    """

    code: ClassVar[str] = "LLMCloudError"
    by_code: ClassVar[dict[str, type[LLMCloudError]]] = {}
    shown: ClassVar[Callable[[str], str]] = staticmethod(str)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "code" in cls.__dict__ and LLMCloudError.by_code.setdefault(cls.code, cls) is not cls:
            raise TypeError(f"{cls.__name__} has the code {cls.code!r} of {LLMCloudError.by_code[cls.code].__name__}")

    @property
    def detail(self) -> dict[str, Any]:
        """What it carries besides its message, as plain values: enough for `restored`."""
        return {}

    @classmethod
    def restored(cls, message: str, detail: Mapping[str, Any]) -> LLMCloudError:
        """The error that had this message and this detail in another process."""
        return cls(message)

    def _render_traceback_(self) -> list[str]:
        # A message for the user, not a bug report: IPython shows this in place of our own frames, and then asks for
        # the message itself.
        self.args = (type(self).shown(str(self)),)
        return [f"{type(self).__name__}: {self}"]


LLMCloudError.by_code[LLMCloudError.code] = LLMCloudError


class UsageError(LLMCloudError):
    """What was typed is not possible."""

    code = "UsageError"


class NotFound(LLMCloudError):
    """No such run, endpoint, cluster, key or variable."""

    code = "NotFound"


class NameTaken(LLMCloudError):
    """The name belongs to something that is alive."""

    code = "NameTaken"


class CapacityError(LLMCloudError):
    """More ranks or replicas were asked for than the cluster can hold."""

    code = "CapacityError"


class Busy(CapacityError):
    """The cluster could hold what was asked for, but not now: others hold the slots."""

    code = "Busy"


class ModelError(LLMCloudError):
    """A folder that holds no model which can be served."""

    code = "ModelError"


class ConnectionLost(LLMCloudError):
    """A process of ours cannot be reached any more."""

    code = "ConnectionLost"


class ServerError(LLMCloudError):
    """The Jupyter server answered with an error."""

    code = "ServerError"


class ProtocolError(LLMCloudError):
    """Two processes of ours do not understand each other: a message or a reply that is not what it should be."""

    code = "ProtocolError"


class SweepFailed(LLMCloudError):
    """A sweep of which nothing came: its message is the first error."""

    code = "SweepFailed"


class InternalError(LLMCloudError):
    """A process of ours failed in a way that nobody foresaw; its log has the traceback."""

    code = "InternalError"


class WorldError(LLMCloudError):
    """A world could not be started, or has lost its ranks."""

    code = "WorldError"


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

    code = "RankError"

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

    @property
    def detail(self) -> dict[str, Any]:
        """What crosses between processes, as plain values."""
        names = ("rank", "ename", "evalue", "traceback", "ranks", "report", "run_id", "place")
        return {**{name: getattr(self, name) for name in names}, "local_variables": self.locals}

    @classmethod
    def restored(cls, message: str, detail: Mapping[str, Any]) -> RankError:
        """The error of another process."""
        return cls(**detail)

    def _render_traceback_(self) -> list[str]:
        self.args = (type(self).shown(str(self)),)
        lines = list(self.traceback) or [f"{self.ename}: {self.evalue}"]
        shown = [type(self).shown(line) for line in [*lines, *self.report]]
        return [*shown[: len(lines)], "", f"RankError: the cell failed on rank {self.rank}.", *shown[len(lines) :]]
