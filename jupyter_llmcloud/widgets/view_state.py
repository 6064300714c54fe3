"""What a view of a run shows, live or saved: plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.metrics.forecasts import Forecasts
from jupyter_llmcloud.core.metrics.series import MetricCollector
from jupyter_llmcloud.core.names import name_ranks
from jupyter_llmcloud.core.run.time_split import shares_of

LIVING = ("queued", "starting", "running")  # of ranks
ACTIVE_STATES = ("queued", "starting", "running", "stopping")
MAX_CHIPS = 8
MAX_CHARS = 60
_ADVICE = re.compile(r"\s*Press Stop[^.]*\.")


@dataclass(frozen=True)
class Hang:
    """What is said of ranks that do not go on."""

    text: str
    late: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()

    @property
    def headline(self) -> str:
        """Who is late and where; what the others do meanwhile, their chips say."""
        return self.text.partition(";")[0]

    @property
    def waits(self) -> str:
        """What stands in place of the time left."""
        return f"waits for {name_ranks(self.late)}" if self.late else "does not go on"


@dataclass
class ViewState:
    """A run as it is shown. `ranks` maps a rank to its state and a detail."""

    run_id: str
    name: str
    state: str = "running"
    elapsed_s: float = 0.0
    ranks: dict[int, tuple[str, str]] = field(default_factory=dict)
    metrics: MetricCollector = field(default_factory=MetricCollector)
    forecasts: Forecasts = field(default_factory=Forecasts, compare=False, repr=False)
    errors: Sequence[Mapping[str, Any]] = ()
    report: Sequence[str] = ()  # what became of the ranks, in words
    reports: list[tuple[str, bool]] = field(default_factory=list)  # (text, whether all goes on again)
    hang: Hang | None = None  # until the ranks go on
    log: Set[str] = frozenset()  # metrics that are drawn in powers of ten
    shares: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # of each rank's last seconds, by part
    seconds: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # of each rank so far, by part
    price: float = 0.0  # of an hour of a rank, 0 where it is not known
    layout: Mapping[str, Any] | None = None  # of the charts, pinned for runs of this name

    def set_rank(self, rank: int, state: str, detail: str = "") -> None:
        """A rank's state has changed; the charts wait for those that can still log."""
        self.ranks[rank] = (state, detail)
        if state in LIVING:
            self.metrics.join(rank)
        else:
            self.metrics.leave(rank)

    def end(self, state: str) -> None:
        """The run is over: nothing more comes of any rank."""
        self.state, self.hang = state, None
        self.metrics.end()

    @property
    def shown_ranks(self) -> dict[int, tuple[str, str]]:
        """Their states, with what the queue or a hang makes of them."""
        if self.state == "queued":
            return dict.fromkeys(self.ranks, ("queued", ""))
        if self.hang is None:
            return self.ranks
        held_up = dict.fromkeys(self.hang.waiting, "waiting") | dict.fromkeys(self.hang.late, "late")
        return {
            rank: (held_up[rank], self.hang.text) if rank in held_up and state in LIVING else (state, detail)
            for rank, (state, detail) in self.ranks.items()
        }

    def split_of(self, rank: int) -> Mapping[str, float]:
        """Where its time goes, as shares: of the last seconds, or of all of a run that has ended; empty if unknown."""
        if self.is_active:
            return self.shares.get(rank, {})
        return shares_of(self.seconds[rank]) if rank in self.seconds else {}

    @property
    def is_active(self) -> bool:
        """Whether the run goes on."""
        return self.state in ACTIVE_STATES

    @property
    def has_data(self) -> bool:
        """Is there anything to draw?"""
        return bool(self.metrics.series or self.metrics.progress.shown())


@dataclass(frozen=True)
class Chip:
    """One rank, or several in the same state when there are many."""

    label: str
    state: str
    detail: str = ""


def chips(ranks: Mapping[int, tuple[str, str]]) -> list[Chip]:
    """A chip per rank; of many ranks, one per state."""
    if len(ranks) <= MAX_CHIPS:
        return [Chip(f"rank {rank}", state, detail) for rank, (state, detail) in sorted(ranks.items())]
    return grouped(ranks)


def grouped(ranks: Mapping[int, tuple[str, str]]) -> list[Chip]:
    """One chip for all ranks that are in the same state for the same reason."""
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, state in sorted(ranks.items()):
        groups.setdefault(state, []).append(rank)
    return [Chip(name_ranks(members), state, detail) for (state, detail), members in groups.items()]


def without_advice(text: str) -> str:
    """A report of a run that is over, which nobody can stop any more."""
    return _ADVICE.sub("", text).strip()


def short(text: str, limit: int = MAX_CHARS) -> str:
    """`text`, cut at `limit` with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
