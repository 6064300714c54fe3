"""A loss or gradient norm that jumps up: a one-sided robust z of its logarithm.

    z = (r - median(R)) / (1.4826 MAD(R)),   r = log x - trend

where the trend is an exponential moving average of log x, so that a loss that falls is no outlier, and R holds the last
r that were not flagged, so that spikes do not hide the next one. (Iglewicz and Hoaglin 1993, How to Detect and Handle
Outliers; gradient norms by z are ZClip's rule, Kumar et al. 2025.)
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

from jupyter_llmcloud.core.detect.detector import Alert
from jupyter_llmcloud.core.output.numerals import format_step

WINDOW = 128  # values that were not flagged
WARM_UP = 64  # of them, before anything is said
LOSS_Z = 6.0
GRADIENT_Z = 6.0
TREND = 0.1  # weight of the newest value
MIN_SCALE = 0.02  # of log x: what is nearly constant does not spike by a rounding error
REFRACTORY = 20  # values after an alert in which nothing more is said
NEW_LEVEL = 20  # flagged values in a row that are no spike but what is normal from now on


@dataclass(frozen=True)
class Value:
    """A value of one metric of one rank."""

    step: float
    value: float


class SpikeDetector:
    """One metric.

    Args:
        name: of the detector.
        metric: in words.
        threshold: of z.
    """

    def __init__(self, name: str, metric: str, threshold: float = LOSS_Z) -> None:
        self._name = name
        self._metric = metric
        self._threshold = threshold
        self._trend = math.nan
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._flagged = 0  # in a row
        self._silent = 0  # values for which nothing is said any more
        self._newest: tuple[Value, float] | None = None  # flagged, with its z

    def feed(self, observation: Value) -> None:
        """Take in the next value; what is not positive and finite has no logarithm and is for other detectors."""
        self._newest = None
        self._silent = max(0, self._silent - 1)
        if not (math.isfinite(observation.value) and observation.value > 0):
            return
        level = math.log(observation.value)
        if math.isnan(self._trend):
            self._trend = level
        residual = level - self._trend
        z = self._z(residual)
        if z > self._threshold:
            self._flagged += 1
            if self._flagged < NEW_LEVEL:
                self._newest = (observation, z)
                return
            self._usual.clear()
            self._trend, residual = level, 0.0
        self._flagged = 0
        self._usual.append(residual)
        self._trend += TREND * (level - self._trend)

    def _z(self, residual: float) -> float:
        if len(self._usual) < WARM_UP:
            return 0.0
        middle = median(self._usual)
        spread = 1.4826 * median(abs(value - middle) for value in self._usual)
        return (residual - middle) / max(spread, MIN_SCALE)

    @property
    def is_flagged(self) -> bool:
        """Whether the newest value is far from what is usual."""
        return self._flagged > 0

    def begin_again(self) -> None:
        """The run has gone back to before what was told: what was usual then still is."""
        self._flagged, self._silent, self._newest = 0, 0, None

    def check(self) -> Alert | None:
        """The newest value, when it is a spike."""
        if self._newest is None or self._silent:
            return None
        (observation, z), self._newest = self._newest, None
        self._silent = REFRACTORY
        return Alert(
            self._name,
            f"{self._metric} jumped to {observation.value:.4g} at step {format_step(observation.step)}",
            f"the last {len(self._usual)} values (robust z of the logarithm)",
            z,
            self._threshold,
            step=observation.step,
            metric=self._metric,
        )
