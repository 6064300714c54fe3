"""Memory that leaks and a disk that fills: how fast, and how long until the limit.

The slope is Theil's and Sen's: the median of the slopes of all pairs (Sen 1968, JASA 63), with its lower bound from
Kendall's variance, n (n - 1) (2 n + 5) / 18. It has to be above zero in each third of the window: a cache that fills up
grows too, but less and less.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from jupyter_llmcloud.core.detect.detector import Alert

NUM_POINTS = 60  # of a window; then every other one is dropped, and the window covers twice the time
MIN_POINTS = 30
RECENT_S = 600.0  # that are looked at alone, too: a leak that begins late would hide behind the quiet before it
MIN_WINDOW_S = 300.0
STEADY = 0.5  # of the slope of the first third that the last one has at least
CHECK_EVERY = 5  # observations: all pairs are compared
CONFIDENT_Z = 3.0
MIN_GROWTH = 0.005  # of the limit, over the window
HORIZON_S = 3600.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Level:
    """Bytes in use at `now` (seconds of any clock), and how many there may be."""

    now: float
    used: float
    limit: float


def slope(points: Sequence[Point], z: float = CONFIDENT_Z) -> tuple[float, float]:
    """The slope of (x, y) and its lower bound at `z` standard errors; NaN for fewer than two different x."""
    slopes = sorted(
        (y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[i + 1 :] if x2 != x1
    )
    if not slopes:
        return math.nan, math.nan
    n = len(points)
    spread = z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return median(slopes), slopes[max(0, int((len(slopes) - spread) / 2))]


class GrowthDetector:
    """One quantity of bytes that has a limit.

    Args:
        name: of the detector.
        what: grows: `memory of rank 1`.
        limit: in words: `memory of its host`.
        ranks: that are concerned.
    """

    def __init__(self, name: str, what: str, limit: str, ranks: tuple[int, ...] = ()) -> None:
        self._name = name
        self._words = (what, limit)
        self._ranks = ranks
        self._points: list[Point] = []
        self._recent: deque[Point] = deque(maxlen=NUM_POINTS)
        self._every = 1  # which of the observations are kept
        self._count = 0
        self._newest: Level | None = None
        self._told = False

    def feed(self, observation: Level) -> None:
        """Take in the next level."""
        self._count += 1
        if not self._recent or observation.now - self._recent[-1][0] >= RECENT_S / NUM_POINTS:
            self._recent.append((observation.now, observation.used))
        if self._count % self._every:
            return
        self._points.append((observation.now, observation.used))
        self._newest = None if self._count % CHECK_EVERY else observation
        if len(self._points) > NUM_POINTS:
            self._points = self._points[::2]
            self._every *= 2

    def check(self) -> Alert | None:
        """Says once that the limit comes within HORIZON_S."""
        newest, self._newest = self._newest, None
        if newest is None or self._told or len(self._points) < MIN_POINTS:
            return None
        found = self._in(self._points, newest)
        if found is None and len(self._recent) >= MIN_POINTS and self._is_higher_than_ever:
            found = self._in(list(self._recent), newest)
        self._told = found is not None
        return found

    @property
    def _is_higher_than_ever(self) -> bool:
        """Whether the newest levels are above all before: what rises and falls again comes back to where it was."""
        began, newest = self._recent[0][0], self._recent[-1][1]
        return newest > max((used for now, used in self._points if now < began), default=0.0)

    def _in(self, points: Sequence[Point], newest: Level) -> Alert | None:
        if points[-1][0] - points[0][0] < MIN_WINDOW_S:
            return None
        if points[-1][1] - points[0][1] < MIN_GROWTH * newest.limit:
            return None
        found, lower = slope(points)
        third = len(points) // 3
        if min(lower, *(slope(points[i * third : (i + 1) * third], 1.0)[1] for i in range(3))) <= 0:
            return None
        latest = slope(points[-third:])[0]  # what grows slower now reaches its limit later
        if latest < STEADY * slope(points[:third])[0]:
            return None
        left_s = max(0.0, newest.limit - newest.used) / min(found, latest)
        if not 0 <= left_s < HORIZON_S:
            return None
        what, limit = self._words
        return Alert(
            self._name,
            f"{what} grows by {60 * found / 2**20:.1f} MiB a minute and reaches the {limit}"
            f" ({newest.limit / 2**30:.1f} GiB) in about {max(1.0, left_s / 60):.0f} min",
            f"{points[-1][0] - points[0][0]:.0f} s, {len(points)} points (Theil-Sen; bytes a second, lower bound)",
            lower,
            0.0,
            ranks=self._ranks,
        )
