"""What a view of a run shows, live or saved: plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.metrics.series import MetricCollector
from jupyter_llmcloud.core.names import format_ranks

ACTIVE_STATES = ("queued", "starting", "running", "stopping")
MAX_CHIPS = 8
MAX_NAME_CHARS = 60


@dataclass
class ViewState:
    """A run as it is shown. `ranks` maps a rank to its state and a detail."""

    run_id: str
    name: str
    state: str = "running"
    elapsed_s: float = 0.0
    ranks: dict[int, tuple[str, str]] = field(default_factory=dict)
    metrics: MetricCollector = field(default_factory=MetricCollector)
    errors: Sequence[Mapping[str, Any]] = ()
    report: Sequence[str] = ()  # what became of the ranks, in words
    reports: list[tuple[str, bool]] = field(default_factory=list)  # (text, whether all goes on again)

    @property
    def alarm(self) -> str:
        """The newest report, until the ranks go on."""
        return self.reports[-1][0] if self.reports and not self.reports[-1][1] else ""

    @property
    def is_active(self) -> bool:
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


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 0` or `ranks 0-3`."""
    members = list(ranks)
    return f"rank{'s' if len(members) != 1 else ''} {format_ranks(members)}"


def short(text: str, limit: int = MAX_NAME_CHARS) -> str:
    """`text`, cut at `limit` with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
