"""When a batch is full enough to be computed: at once while it is quiet, a little later when more is on its way.

Rows that come while a batch is computed wait anyway, and make the next batch: under load batches grow without a timer.
Waiting beyond that pays only when another row is expected sooner than a good part of a batch's own duration.
"""

from __future__ import annotations

from dataclasses import dataclass

_SHARE_OF_STEP = 0.5  # of a batch's duration, that its first row may wait for others
_PATIENCE = 3.0  # times the usual gap between rows, after which no other one is expected
_WEIGHT = 0.2  # of the newest value in a running mean


@dataclass
class BatchPolicy:
    """Decides how long rows wait for others. Times are in seconds, all on one clock.

    Attributes:
        max_rows: of one batch.
        max_wait_s: that a row waits for others, at most.
        gap_s: between two rows that came, on the mean; None: not known yet.
        step_s: that a batch took, on the mean; None: not known yet.
    """

    max_rows: int
    max_wait_s: float = 0.02
    gap_s: float | None = None
    step_s: float | None = None
    _last_arrival: float | None = None

    def arrived(self, now: float, num_rows: int = 1) -> None:
        """Rows came, together."""
        if self._last_arrival is not None:
            self.gap_s = _mean(self.gap_s, (now - self._last_arrival) / num_rows)
        self._last_arrival = now

    def computed(self, duration_s: float) -> None:
        """A batch took so long."""
        self.step_s = _mean(self.step_s, duration_s)

    @property
    def longest_wait_s(self) -> float:
        """How long the first row of a batch waits for others at most, as things are."""
        if self.step_s is None or self.gap_s is None:
            return 0.0
        return min(self.max_wait_s, _SHARE_OF_STEP * self.step_s)

    def wait_s(self, num_rows: int, oldest: float, now: float) -> float:
        """How long to wait on for another row; 0: compute what there is.

        Args:
            num_rows: that wait.
            oldest: when the first of them came.
            now: the time.
        """
        if num_rows >= self.max_rows or self.gap_s is None or self._last_arrival is None:
            return 0.0
        longest = self.longest_wait_s
        if self.gap_s > longest:  # the next one is expected too late
            return 0.0
        until = min(oldest + longest, self._last_arrival + _PATIENCE * self.gap_s)
        return max(0.0, until - now)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _WEIGHT * (value - before)
