"""What a range test says: a learning rate from losses at growing rates, a batch size from speeds at growing sizes.

The first is that of Smith (2017): the rate grows by a constant factor a step; where the smoothed loss falls steepest,
training is fastest. The second doubles the batch until memory would be short or the rows per second grow no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

SMOOTHING = 0.9  # of the exponential mean of losses
DIVERGED = 4.0  # times the lowest smoothed loss above zero
LEAST_POINTS = 10
FALLEN = 0.25  # of the whole fall, which is more than batches differ by
FLAT = 1.1  # rows per second of twice the batch must be so many times those before
SPARE = 0.8  # of the memory that is free


def smoothed(losses: Sequence[float]) -> list[float]:
    """The exponential mean, without the weight of its start."""
    mean, found = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**count))
    return found


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether a longer test would tell nothing more."""
    if not math.isfinite(losses[-1]):
        return True
    curve = smoothed(losses)
    return len(losses) > LEAST_POINTS and curve[-1] > _too_high(losses, min(curve))


def _too_high(losses: Sequence[float], lowest: float) -> float:
    """Where losses may be negative or go through zero, four times the lowest is no measure: how they differ is."""
    if min(losses) > 0:
        return DIVERGED * max(lowest, 1e-12)
    first = losses[:LEAST_POINTS]
    return lowest + DIVERGED * max(abs(lowest), max(first) - min(first))


@dataclass(frozen=True)
class RateFound:
    """A learning rate, and why.

    Attributes:
        rate: the one that is suggested; None when the losses tell none.
        lowest: rate at which the smoothed loss was lowest.
        reason: in words.
    """

    rate: float | None
    lowest: float | None
    reason: str


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> RateFound:
    """From the losses at growing rates."""
    known = [(rate, loss) for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    if len(known) < LEAST_POINTS:
        words = f"only {len(known)} losses were finite: begin with a lower rate (--low)"
        return RateFound(None, None, words)
    losses = [loss for _, loss in known]
    curve, start = smoothed(losses), fmean(losses[: max(LEAST_POINTS, len(losses) // 5)])
    lowest = min(range(len(curve)), key=curve.__getitem__)
    drop = start - curve[lowest]
    if lowest == 0 or drop <= 0.02 * abs(start):
        return RateFound(None, None, f"at no rate the loss fell: it began at {start:.4g} and went to {curve[-1]:.4g}")
    steepest = min(range(_fall(curve, lowest, start), lowest + 1), key=lambda at: _slope(known, curve, at))
    rate, end = known[steepest][0], known[lowest][0]
    words = (
        f"the loss fell steepest at {rate:.2g}; it was lowest, {curve[lowest]:.4g} from {start:.4g}, at {end:.2g}, "
        f"and rises from there"
    )
    if lowest == len(curve) - 1:
        words = (
            f"the loss fell steepest at {rate:.2g}, and still fell at the highest rate, {end:.2g}: try a higher --high"
        )
    return RateFound(rate, end, words)


def _fall(curve: Sequence[float], lowest: int, start: float) -> int:
    """Where the loss begins to fall for good: batches differ, most of all before the mean is one of many."""
    fallen = start - FALLEN * (start - curve[lowest])
    return max((at for at in range(lowest) if curve[at] >= fallen), default=0)


def _slope(known: Sequence[tuple[float, float]], curve: Sequence[float], at: int) -> float:
    """Change of the loss by decade, over the neighbours on both sides."""
    first, last = max(0, at - 2), min(len(curve) - 1, at + 2)
    return (curve[last] - curve[first]) / math.log10(known[last][0] / known[first][0])


@dataclass(frozen=True)
class BatchMeasured:
    """A step with a batch of so many rows on each rank: rows per second over all ranks, memory of a rank in bytes.

    `fits` is false where memory was not enough.
    """

    size: int
    rows_per_s: float
    memory_bytes: int
    fits: bool = True


def why_stop(measured: Sequence[BatchMeasured], free_bytes: int, most: int) -> str:
    """Why no larger batch is tried; "" to go on with twice the last one."""
    last = measured[-1]
    if not last.fits:
        return f"a batch of {last.size} did not fit into memory"
    if last.size * 2 > most:
        return f"there are no more than {most} rows"
    if len(measured) > 1:
        before = measured[-2]
        growth = last.memory_bytes - before.memory_bytes
        if 2 * growth > SPARE * free_bytes > 0:
            return f"a batch of {last.size * 2} would need about {2 * growth / 2**20:,.0f} MiB more than is free"
        if last.rows_per_s < FLAT * before.rows_per_s:
            ratio = last.rows_per_s / before.rows_per_s
            return f"{last.size} rows went {ratio:.2f} times as fast as {before.size}: more is not faster"
    return ""


def suggest_size(measured: Sequence[BatchMeasured]) -> int | None:
    """The smallest batch that is nearly as fast as the fastest one; None when none fits."""
    fitting = [row for row in measured if row.fits]
    if not fitting:
        return None
    fastest = max(row.rows_per_s for row in fitting)
    return min(row.size for row in fitting if row.rows_per_s * FLAT >= fastest)
