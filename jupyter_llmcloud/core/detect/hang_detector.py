"""The watch for hangs as a detector: what is seen of ranks goes in, late ranks come out as an alert.

The rule is that of core.run.hang. What goes in carries its time: the same observations give the same alerts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jupyter_llmcloud.core.detect.detector import Alert
from jupyter_llmcloud.core.run.hang import ADVICE, GroupState, HangReport, HangRule, Sample


@dataclass(frozen=True)
class Heard:
    """The side thread of a rank has published."""

    rank: int
    sample: Sample
    now: float


@dataclass(frozen=True)
class Looked:
    """The process of a silent rank was looked at; `place` as in Sample."""

    rank: int
    state: str
    cpu_s: float
    place: str = ""


@dataclass(frozen=True)
class Ended:
    """A rank has finished the cell with these collectives."""

    rank: int
    groups: Mapping[str, GroupState]


@dataclass(frozen=True)
class Moment:
    """So late is it; about once a second."""

    now: float


HangObservation = Heard | Looked | Ended | Moment


class HangDetector:
    """One run.

    Args:
        ranks: that take part in the run.
        world_size: of the world, whose groups may have other members.
        began: when the run began.
        floor_s: a wait of less is no hang.

    Attributes:
        report: what the last `check` has found, in full: also that ranks go on again, which is no alert.
    """

    def __init__(self, ranks: tuple[int, ...], world_size: int, began: float, floor_s: float) -> None:
        self._rule = HangRule(ranks, world_size, began, floor_s)
        self._now = began
        self.report: HangReport | None = None

    def feed(self, observation: HangObservation) -> None:
        """Take in what is seen next."""
        match observation:
            case Heard(rank, sample, now):
                self._rule.heard(rank, sample, now)
            case Looked(rank, state, cpu_s, place):
                self._rule.looked(rank, state, cpu_s, place)
            case Ended(rank, groups):
                self._rule.ended(rank, groups)
            case Moment(now):
                self._now = now

    def silent(self) -> list[int]:
        """Ranks that should have said something by now, and are to be looked at."""
        return self._rule.silent(self._now)

    def check(self) -> Alert | None:
        """Ranks that are late, or wait for each other, when that is new."""
        report = self.report = self._rule.check(self._now)
        return None if report is None or report.recovered else as_alert(report)


def as_alert(report: HangReport) -> Alert:
    """What is told of late ranks, with its evidence."""
    return Alert(
        "hang",
        ADVICE.split(report.text)[0].rstrip(".;"),
        "seconds of the longest wait (limit: the least there is, or 5 times the 99th percentile of such waits)",
        report.lasts_s,
        report.limit_s,
        ranks=report.late or report.waiting,
    )
