"""How long a progress bar still takes, with an interval: a block bootstrap over what its steps have taken so far.

Steps are not alike: an evaluation, a checkpoint or a replaced rank comes between them and takes as long as many. So
steps are kept in bins, and blocks of neighbouring bins are drawn again and again (Künsch 1989): what comes in bursts or
periods stays together, and what has been seen of pauses is expected to come again as often. Few blocks say less than
they seem to, and a past that is short beside the future has not shown all: both widen the interval.

A pace that doubles or halves for good later on is in no past. Where one run of six does, the interval at a tenth of the
way holds the truth in 70 % of the runs in place of LEVEL; one that held it in LEVEL would be as wide as the truth
itself. From a quarter of the way on it is what it says (`python -m tests.chaos eta`).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MAX_BINS = 128
MIN_BINS = 8  # with fewer there is no interval
NUM_DRAWS = 100
LEVEL = 0.8  # how often the truth is to lie within the interval
TREND_T = 3.0  # how sure a slope must be, in standard errors, before it is believed to go on
NUM_PARTS = 8  # of the past, whose means tell a slope and slow changes
UNSEEN = 0.03  # of the pace, by which it changes for reasons that have not shown yet, in LEVEL of the cases
STUDENT = 0.66  # (z * z + 1) / 4 at LEVEL: the first term of its quantile's expansion
SHIFT_Z = 4.0  # how far apart the means of two halves are when the older one tells nothing of the future


@dataclass(frozen=True)
class TimeLeft:
    """Seconds that are left: as likely more as less than `middle`, between `low` and `high` at LEVEL."""

    low: float
    middle: float
    high: float


class StepDurations:
    """What the steps of a bar have taken, in at most MAX_BINS bins of equally many units each."""

    def __init__(self) -> None:
        self._bins: list[float] = []  # seconds of each
        self._width = 0.0  # units of each; known with the first
        self._units = 0.0  # of the bin that is being filled
        self._seconds = 0.0
        self._known: tuple[float, TimeLeft] | None = None  # what was found last: units left, and their time

    def add(self, units: float, seconds: float) -> None:
        """The bar has moved by so many units, which took so long."""
        self._width = self._width or units
        while units > 0:
            part = min(units, self._width - self._units)
            took = seconds * part / units
            self._units, self._seconds = self._units + part, self._seconds + took
            units, seconds = units - part, seconds - took
            if self._units >= self._width * (1 - 1e-9):
                self._bins.append(self._seconds)
                self._units = self._seconds = 0.0
                self._known = None
                self._make_room()

    def _make_room(self) -> None:
        if len(self._bins) >= MAX_BINS:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [first + second for first, second in pairs]
            self._width *= 2

    def left(self, units: float) -> TimeLeft | None:
        """What so many more units will take; None before enough has been seen. Found anew with each bin."""
        if units <= 0:
            return None
        if self._known is None:
            bins = _of_now(self._bins)
            if len(bins) < MIN_BINS:
                return None
            self._known = units, _bootstrap(bins, units / self._width)
        known_units, known = self._known
        scale = units / known_units
        return TimeLeft(known.low * scale, known.middle * scale, known.high * scale)


def _of_now(bins: Sequence[float]) -> Sequence[float]:
    """The newest bins that are of one kind: without those before the pace has changed for good."""
    while len(bins) >= 2 * MIN_BINS:
        half = len(bins) // 2
        old, new = bins[:half], bins[half:]
        error = math.hypot(_error_of_mean(old), _error_of_mean(new))
        if abs(statistics.fmean(old) - statistics.fmean(new)) <= SHIFT_Z * error:
            return bins
        bins = new
    return bins


def _error_of_mean(bins: Sequence[float]) -> float:
    """The standard error of their mean, by means of blocks, so that bins which are alike in a row do not seem many."""
    length = _block_length(len(bins))
    means = [statistics.fmean(bins[at : at + length]) for at in range(0, len(bins) - length + 1, length)]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.inf


def _block_length(num_bins: int) -> int:
    return max(1, round(math.sqrt(num_bins)))


def _bootstrap(bins: Sequence[float], num_left: float) -> TimeLeft:
    """A resample of what was seen tells how sure its mean is, one of its length how the future varies round it."""
    random_, mean = random.Random(0), statistics.fmean(bins)
    num_future = max(1, min(len(bins), round(num_left)))
    spread = math.sqrt(num_future / num_left) if num_left > num_future else 1.0
    length = _dependent_length(bins)
    few = _of_few(len(bins) / length)
    draws = []
    for _ in range(NUM_DRAWS):
        past, future = (_resampled_mean(bins, number, length, random_) - mean for number in (len(bins), num_future))
        draws.append(num_left * few * (past + spread * future))
    draws.sort()
    slope, is_sure = _trend(bins)
    trend = num_left * max(-mean / 2, min(mean / 2, slope * (len(bins) + num_left) / 2))
    edge = (1 - LEVEL) / 2
    unseen = UNSEEN * num_left * mean * math.sqrt(math.log1p(num_left / len(bins)))
    low = min(0.0, trend) - math.hypot(_quantile(draws, edge), unseen)
    high = max(0.0, trend) + math.hypot(_quantile(draws, 1 - edge), unseen)
    middle = num_left * mean
    return TimeLeft(max(0.0, middle + low), middle + (trend / 2 if is_sure else 0.0), max(0.0, middle + high))


def _dependent_length(bins: Sequence[float]) -> int:
    """The length of blocks at which neighbours that are alike show most: long ones where the pace changes slowly."""
    lengths = {_block_length(len(bins)), max(1, len(bins) // NUM_PARTS)}
    return max(sorted(lengths), key=lambda length: length * _variance_of_means(bins, length))


def _variance_of_means(bins: Sequence[float], length: int) -> float:
    means = [statistics.fmean(bins[at : at + length]) for at in range(0, len(bins) - length + 1, length)]
    return statistics.variance(means) if len(means) > 1 else 0.0


def _of_few(num_blocks: float) -> float:
    """By how much so few blocks understate the spread: a resample's variance, and Student's quantile beside Gauss'."""
    degrees = max(1.0, num_blocks - 1)
    return math.sqrt(1 + 1 / degrees) * (1 + STUDENT / degrees)


def _trend(bins: Sequence[float]) -> tuple[float, bool]:
    """By how much each bin takes longer than the one before it, and whether that is more than chance.

    Nobody knows whether a slope goes on: the interval reaches from none of it to all, held to half of the mean, and the
    middle takes half of one that is sure.
    """
    length = len(bins) // NUM_PARTS
    offset = len(bins) - NUM_PARTS * length
    parts = [statistics.fmean(bins[at : at + length]) for at in range(offset, len(bins), length)]
    slope, intercept = statistics.linear_regression(range(NUM_PARTS), parts)
    rest = sum((part - intercept - slope * at) ** 2 for at, part in enumerate(parts)) / (NUM_PARTS - 2)
    error = math.sqrt(rest * 12 / (NUM_PARTS**3 - NUM_PARTS))
    return slope / length, abs(slope) > TREND_T * error


def _resampled_mean(bins: Sequence[float], number: int, length: int, random_: random.Random) -> float:
    length = min(length, number)
    num_blocks = math.ceil(number / length)
    starts = (random_.randrange(len(bins)) for _ in range(num_blocks))
    # Blocks go on at the beginning, so that the bins at both ends are drawn as often as the others.
    return sum(bins[(start + at) % len(bins)] for start in starts for at in range(length)) / (num_blocks * length)


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, max(0, round(share * (len(values) - 1))))]
