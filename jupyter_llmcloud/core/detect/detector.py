"""What every detector is: observations are fed to it, and it says at most one alert with the evidence for it.

A detector has no clock and reads nothing: the same observations give the same alerts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

ONE_IS_ENOUGH = 1  # as a threshold: what was seen once needs no count
Observation_contra = TypeVar("Observation_contra", contravariant=True)


@dataclass(frozen=True)
class Alert:
    """Something is wrong, and what was seen of it.

    Attributes:
        detector: its name, as in DETECTORS of run_detectors.
        text: one sentence for the user.
        window: what was looked at: `the last 128 values of loss`.
        statistic, threshold: the value that the window gave, and the one that it had to pass.
        step: of training, where it is known.
        metric: which is concerned, "" for none.
        ranks: which are concerned.
        between: optimizer steps finished at the last good value and at the bad one, where ranks tell them.
    """

    detector: str
    text: str
    window: str
    statistic: float
    threshold: float
    step: float | None = None
    metric: str = ""
    ranks: tuple[int, ...] = ()
    between: tuple[int, int] | None = None

    @property
    def evidence(self) -> str:
        """`robust z 9.1 over 6 in the last 128 values of loss`."""
        counted = f"{self.statistic:.3g}, threshold {self.threshold:g}, over "
        return (counted if self.threshold != ONE_IS_ENOUGH else "") + self.window


class Detector(Protocol[Observation_contra]):
    """One rule over one series of observations."""

    def feed(self, observation: Observation_contra) -> None:
        """Take in what is seen next, in order of time."""

    def check(self) -> Alert | None:
        """What the newest observation means; the same trouble is told once until it is over."""
