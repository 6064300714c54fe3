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

NUM_POINTS = 60  # of a window; of that of the whole run every other one is then dropped, and it covers twice the time
MIN_POINTS = 30
# Windows beside that of the whole run, which are as long as this: a leak that begins late would hide behind the quiet
# before it, one that fills the memory within minutes would be over before a long window is full.
RECENT_S = (600.0, 120.0)
MIN_WINDOW_S = 300.0
SHORTEST_S = 55.0  # of a window, when less time is left than it has lasted: half of the room is filled by then
STEADY = 0.5  # of the slope of the first third that the last one has at least
FALLEN = 0.5  # of the growth by which a level may fall on the way: what is emptied again and again is no leak
FAR = 3.0  # times the horizon, by first and last level alone: nearer than that, all pairs are compared
CHECK_EVERY = 5  # observations: all pairs are compared
CONFIDENT_Z = 3.0
MIN_GROWTH = 0.005  # of the limit, over the window
TOGETHER = 1.5  # times its own growth: from there on it is said how fast all of them fill what they share
HORIZON_S = 3600.0

Point = tuple[float, float]
_MIB_A_MINUTE = 60 / 2**20


@dataclass(frozen=True)
class Level:
    """Bytes in use at `now` (seconds of any clock), and how many there may be.

    The limit of who shares a host with others falls when they take more.
    """

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
        self._points: list[Level] = []
        self._recent: tuple[deque[Level], ...] = tuple(deque(maxlen=NUM_POINTS) for _ in RECENT_S)
        self._every = 1  # which of the observations are kept
        self._count = 0
        self._newest: Level | None = None
        self._told = False

    def feed(self, observation: Level) -> None:
        """Take in the next level."""
        self._count += 1
        for window, lasts_s in zip(self._recent, RECENT_S, strict=True):
            if not window or observation.now - window[-1].now >= lasts_s / NUM_POINTS:
                window.append(observation)
        if not self._count % self._every:
            self._points.append(observation)
        self._newest = None if self._count % CHECK_EVERY else observation
        if len(self._points) > NUM_POINTS:
            self._points = self._points[::2]
            self._every *= 2

    def check(self) -> Alert | None:
        """Says once that the limit comes within HORIZON_S."""
        newest, self._newest = self._newest, None
        if newest is None or self._told:
            return None
        found = self._in(self._points, newest)
        for window in self._recent:
            if found is None and self._is_higher_than_ever(window):
                found = self._in(list(window), newest)
        self._told = found is not None
        return found

    def _is_higher_than_ever(self, window: Sequence[Level]) -> bool:
        """Whether the newest levels are above all before: what rises and falls again comes back to where it was."""
        began, newest = window[0].now, window[-1].used
        return newest > max((level.used for level in self._points if level.now < began), default=0.0)

    def _in(self, points: Sequence[Level], newest: Level) -> Alert | None:
        if len(points) < MIN_POINTS:
            return None
        lasts_s, grown = points[-1].now - points[0].now, points[-1].used - points[0].used
        if lasts_s < SHORTEST_S or grown < MIN_GROWTH * newest.limit or _is_far(points, newest):
            return None
        if _largest_fall(points) > FALLEN * grown:
            return None
        rates = _steady_rates([(level.now, level.used) for level in points])
        if rates is None:
            return None
        own, lower, latest = rates
        fills = max(min(own, latest), _rate_of_all(points))
        left_s = max(0.0, newest.limit - newest.used) / fills
        if not 0 <= left_s < HORIZON_S or lasts_s < min(MIN_WINDOW_S, left_s):
            return None
        what, limit = self._words
        beside = f" ({fills * _MIB_A_MINUTE:.1f} with all beside it)" if fills > TOGETHER * own else ""
        return Alert(
            self._name,
            f"{what} grows by {own * _MIB_A_MINUTE:.1f} MiB a minute{beside} and reaches the {limit}"
            f" ({newest.limit / 2**30:.1f} GiB) in about {max(1.0, left_s / 60):.0f} min",
            f"{lasts_s:.0f} s, {len(points)} points (Theil-Sen; bytes a second, lower bound)",
            lower,
            0.0,
            ranks=self._ranks,
        )


def _is_far(points: Sequence[Level], newest: Level) -> bool:
    """Whether the limit is out of reach at a glance, by its own growth or that of all that share it."""
    first, last = points[0], points[-1]
    fills = max(last.used - first.used, (first.limit - first.used) - (last.limit - last.used))
    return (newest.limit - newest.used) * (last.now - first.now) > FAR * HORIZON_S * fills


def _largest_fall(points: Sequence[Level]) -> float:
    """From any level to a later one."""
    highest, fall = points[0].used, 0.0
    for level in points:
        highest = max(highest, level.used)
        fall = max(fall, highest - level.used)
    return fall


def _steady_rates(points: Sequence[Point]) -> tuple[float, float, float] | None:
    """The slope, its lower bound and the slope of the last third; None where it is not above zero all the time.

    What grows slower now reaches its limit later, and what grows less and less perhaps never.
    """
    found, lower = slope(points)
    third = len(points) // 3
    if min(lower, *(slope(points[at * third : (at + 1) * third], 1.0)[1] for at in range(3))) <= 0:
        return None
    latest = slope(points[-third:])[0]
    return None if latest < STEADY * slope(points[:third])[0] else (found, lower, latest)


def _rate_of_all(points: Sequence[Level]) -> float:
    """How fast what is left becomes less, by all that share it; 0 where that is not sure."""
    rates = _steady_rates([(level.now, level.used - level.limit) for level in points])
    return min(rates[0], rates[2]) if rates is not None else 0.0
