"""How many rows of a global batch each rank takes, by how fast it has been (`--balance`).

What a rank needs for a row is measured in windows. Shares change when two windows in a row say that a step would become
faster by more than `MIN_GAIN`: noise moves nothing, and a neighbour that comes or goes is followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MIN_WINDOW_S = 0.4  # of the slowest rank; what is shorter tells too little of a machine that is shared
MIN_GAIN = 1.05


def rows_of(weights: Sequence[float], total: int, least: int = 1) -> list[int]:
    """Whole rows in proportion to weights, `least` at least where there are enough; they sum up to the total."""
    num = len(weights)
    if total < num:
        return [int(rank < total) for rank in range(num)]
    least = min(least, total // num)
    spare, whole = total - num * least, sum(weights)
    exact = [max(0.0, weight / whole * total - least) for weight in weights]
    scale = spare / sum(exact) if sum(exact) else 0.0
    rows = [least + int(value * scale + 1e-9) for value in exact]
    # The largest remainder first; of equal ones the first rank's.
    order = sorted(range(num), key=lambda rank: (rows[rank] - least - exact[rank] * scale, rank))
    for rank in order[: total - sum(rows)]:
        rows[rank] += 1
    return rows


@dataclass
class Balance:
    """What each rank takes, in proportion to `weights`; every rank holds one that is told the same.

    Attributes:
        num_ranks: of the world.
        weights: equal until something else is known.
        least: rows of each, where there are enough.
    """

    num_ranks: int
    weights: list[float] = field(default_factory=list)
    least: int = 1
    _seconds: list[float] = field(default_factory=list)
    _rows: list[float] = field(default_factory=list)
    _before: list[float] | None = None  # seconds a row, of a window that called for a change

    def __post_init__(self) -> None:
        self.weights = self.weights or [1.0] * self.num_ranks
        self._clear()

    def rows(self, total: int) -> list[int]:
        """Of a batch of so many rows over all ranks."""
        if all(weight == self.weights[0] for weight in self.weights):
            bounds = [total * rank // self.num_ranks for rank in range(self.num_ranks + 1)]
            return [high - low for low, high in pairwise(bounds)]
        return rows_of(self.weights, total, self.least)

    def observe(self, seconds: Sequence[float], rows: Sequence[float]) -> bool:
        """Some steps have taken each rank so long for so many rows. Returns whether shares change."""
        self._seconds = [a + b for a, b in zip(self._seconds, seconds, strict=True)]
        self._rows = [a + b for a, b in zip(self._rows, rows, strict=True)]
        if max(self._seconds) < MIN_WINDOW_S or min(self._seconds) <= 0 or min(self._rows) <= 0:
            return False
        each = [spent / num for spent, num in zip(self._seconds, self._rows, strict=True)]
        self._clear()
        if self._gain(each) < MIN_GAIN:
            self._before = None
            return False
        if self._before is None:
            self._before = each
            return False
        mean = [(a + b) / 2 for a, b in zip(self._before, each, strict=True)]
        self._before = None
        if self._gain(mean) < MIN_GAIN:
            return False
        self.weights = _shares_of(mean)
        return True

    def _gain(self, each: Sequence[float]) -> float:
        """How much longer a step takes with the shares of now than with those that suit these speeds."""
        now = max(weight * cost for weight, cost in zip(self.weights, each, strict=True)) / sum(self.weights)
        return now * sum(1 / cost for cost in each)

    def _clear(self) -> None:
        self._seconds, self._rows = [0.0] * self.num_ranks, [0.0] * self.num_ranks


def _shares_of(each: Sequence[float]) -> list[float]:
    speeds = [1 / cost for cost in each]
    return [speed / sum(speeds) for speed in speeds]
