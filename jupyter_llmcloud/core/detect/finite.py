"""A loss that is NaN or infinite, as a detector: told once until it is finite again."""

from __future__ import annotations

import math

from jupyter_llmcloud.core.detect.detector import ONE_IS_ENOUGH, Alert
from jupyter_llmcloud.core.detect.spikes import Value
from jupyter_llmcloud.core.output.numerals import format_step


class FiniteDetector:
    """One metric.

    Args:
        metric: in words.
    """

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._is_told = False
        self._newest: Value | None = None

    def feed(self, observation: Value) -> None:
        """Take in the next value."""
        is_bad = not math.isfinite(observation.value)
        self._is_told = self._is_told and is_bad
        self._newest = observation if is_bad else None

    @property
    def is_flagged(self) -> bool:
        """Whether the newest value is not finite."""
        return self._newest is not None

    def begin_again(self) -> None:
        """The run has gone back to before what was told."""
        self._is_told, self._newest = False, None

    def check(self) -> Alert | None:
        """The newest value, when it is the first that is not finite."""
        if self._newest is None or self._is_told:
            return None
        self._is_told, newest = True, self._newest
        word = "NaN" if math.isnan(newest.value) else "infinite"
        text = f"{self._metric} is {word} at step {format_step(newest.step)}"
        every = f"every value of {self._metric}"
        return Alert("not-finite", text, every, 1, ONE_IS_ENOUGH, step=newest.step, metric=self._metric)
