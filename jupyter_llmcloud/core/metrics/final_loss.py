"""Where the loss will be in the end: a power law through what it was, which has to have foretold its own past.

    loss(t) = floor + scale * t ** -exponent

(Hestness et al. 2017; Kaplan et al. 2020 for language models.) The exponent and the floor are looked for on a grid, the
rest is a least-squares line through means of stretches that are even in log t, so that the many late steps do not
outweigh the early ones. The law is believed only when a fit of the first part of the curve would have foretold the last
one, and only where a logged learning rate shows that it does not change: a decay lets a loss fall as no power law
knows, and no curve tells of one that is still to come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

Curve = Sequence[tuple[float, float]]  # steps, from 1 on, and losses

MIN_POINTS = 40
MIN_SHARE = 0.2  # of all steps that have to be done
NUM_STRETCHES = 24
SKIPPED = 0.1  # of the curve, its beginning: warm-up
TOLD_FROM = 0.6  # of the curve, that the back-test fits; the rest is to be foretold
MAX_ERROR = 0.04  # of the loss, in the back-test
MAX_OF_DROP = 0.35  # of what the loss fell in the foretold part
SAME_RATE = 0.02  # by which learning rates of one schedule may differ
WIDENED = 2.0  # times the error of the back-test, on both sides
LARGEST = 1e100  # a loss beyond has exploded, and its square is no number
EXPONENTS = tuple(0.05 * 1.1**n for n in range(39))  # 0.05 to 1.9


@dataclass(frozen=True)
class FinalLoss:
    """The loss at the last step: as likely above as below `middle`, about between `low` and `high`."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class _Law:
    floor: float
    scale: float
    exponent: float
    error: float

    def at(self, step: float) -> float:
        return self.floor + self.scale * float(step**-self.exponent)


def foretell(losses: Curve, final_step: float, rates: Curve) -> FinalLoss | None:
    """The loss at `final_step`; None when nothing can be said of it. `rates`: of learning."""
    known = [(step, loss) for step, loss in losses if step >= 1 and math.isfinite(loss)]
    if len(known) < MIN_POINTS or known[-1][0] < MIN_SHARE * final_step:
        return None
    if max(abs(loss) for _, loss in known) > LARGEST:
        return None
    last = known[-1][0]
    known = [(step, loss) for step, loss in known if step > SKIPPED * last]
    if not _is_steady([(step, rate) for step, rate in rates if step > SKIPPED * last]):
        return None
    early = [point for point in known if point[0] <= TOLD_FROM * last]
    late = [point for point in known if point[0] > TOLD_FROM * last]
    told, law = _fit(early), _fit(known)
    if told is None or law is None or (error := _back_test(told, early, late)) is None:
        return None
    middle = law.at(final_step)
    reach = WIDENED * max(error, abs(told.at(final_step) - middle) / 2)
    return FinalLoss(middle - reach, middle, middle + reach)


def _is_steady(rates: Curve) -> bool:
    values = [rate for _, rate in rates if math.isfinite(rate)]
    return len(values) > 1 and max(values) - min(values) <= SAME_RATE * max(map(abs, values))


def _back_test(told: _Law, early: Curve, late: Curve) -> float | None:
    """How far the law of the early part is from the late one; None where that is too far."""
    thirds = [late[len(late) * n // 3 : len(late) * (n + 1) // 3] for n in range(3)]
    errors = [abs(fmean(told.at(step) for step, _ in third) - _level(third)) for third in thirds if third]
    level, fell = _level(late), _level(early[-max(1, len(early) // 3) :]) - _level(thirds[-1])
    noise = 2 * _noise(late) / math.sqrt(max(1, len(thirds[-1])))
    allowed = max(min(MAX_ERROR * abs(level), MAX_OF_DROP * max(0.0, fell)), noise)
    return max(*errors, noise) if max(errors) <= allowed else None


def _level(points: Curve) -> float:
    return fmean(loss for _, loss in points)


def _noise(points: Curve) -> float:
    """Of one loss beside the next, which a trend hardly touches."""
    steps = [abs(b - a) for (_, a), (_, b) in pairwise(points)]
    return 1.05 * median(steps) if steps else 0.0


def _fit(points: Curve) -> _Law | None:
    stretches = _stretches(points) if points else []  # a run that goes on from a checkpoint has no early part
    if len(stretches) < 6:
        return None
    found = min((_line(stretches, exponent) for exponent in EXPONENTS), key=lambda law: law.error)
    return found if found.scale >= 0 and math.isfinite(found.error) else None


def _stretches(points: Curve) -> list[tuple[float, float]]:
    """Means of stretches that are even in log t."""
    first, last = math.log(points[0][0]), math.log(points[-1][0])
    width = (last - first) / NUM_STRETCHES or 1.0
    held: dict[int, list[tuple[float, float]]] = {}
    for step, loss in points:
        held.setdefault(min(NUM_STRETCHES - 1, int((math.log(step) - first) / width)), []).append((step, loss))
    return [(math.exp(fmean(math.log(step) for step, _ in part)), _level(part)) for _, part in sorted(held.items())]


def _line(points: Curve, exponent: float) -> _Law:
    """Least squares of the floor and the scale for one exponent; a floor below zero is no loss."""
    x = [step**-exponent for step, _ in points]
    y = [loss for _, loss in points]
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    scale = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0
    floor = mean_y - scale * mean_x
    if floor < 0 < mean_y:
        floor, scale = 0.0, sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    error = sum((floor + scale * a - b) ** 2 for a, b in zip(x, y, strict=True))
    return _Law(floor, scale, exponent, error)
