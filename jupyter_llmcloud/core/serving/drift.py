"""Whether what is asked of an endpoint, and how its answers are judged, has changed: the population stability index.

PSI = sum over bins of (p - q) ln(p / q), where p and q are the shares of a bin among the earlier and the recent values
(Siddiqi 2006, Credit Risk Scorecards). By its usual reading, under 0.1 nothing has changed, over 0.25 much has.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

NUM_BINS = 10
MIN_VALUES = 50  # fewer on either side say nothing
MINOR, MAJOR = 0.1, 0.25


@dataclass(frozen=True)
class QuantityDrift:
    """How far a quantity has moved. `psi` is None where there were too few values to tell."""

    name: str
    num_earlier: int
    num_recent: int
    mean_earlier: float | None
    mean_recent: float | None
    psi: float | None

    @property
    def verdict(self) -> str:
        """unknown, none, minor or major."""
        if self.psi is None:
            return "unknown"
        return "none" if self.psi < MINOR else "minor" if self.psi < MAJOR else "major"


def population_stability(earlier: Sequence[float], recent: Sequence[float], num_bins: int = NUM_BINS) -> float:
    """The index of two samples, by bins that hold equal shares of the earlier one.

    A value that fills a bin by itself has one, or what lies below it would be counted with it: of ratings that were all
    up, none could ever fall. A bin that is empty in one sample counts as half a value, so that the index is finite.
    """
    edges = _edges(sorted(earlier), num_bins)
    total = 0.0
    p, q = _counts(earlier, edges), _counts(recent, edges)
    for before, after in zip(p, q, strict=True):
        if not before and not after:
            continue
        share_before = max(before, 0.5) / len(earlier)
        share_after = max(after, 0.5) / len(recent)
        total += (share_before - share_after) * math.log(share_before / share_after)
    return total


def _edges(ordered: Sequence[float], num_bins: int) -> list[float]:
    """The greatest value within each bin but the last."""
    edges = {ordered[max(0, len(ordered) * step // num_bins - 1)] for step in range(1, num_bins)}
    heavy = {
        edge for edge in edges if (bisect_right(ordered, edge) - bisect_left(ordered, edge)) * num_bins > len(ordered)
    }
    return sorted(edges | {math.nextafter(edge, -math.inf) for edge in heavy})


def _counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    counts = [0] * (len(edges) + 1)
    for value in values:
        counts[bisect_left(edges, value)] += 1
    return counts


def drift_of(name: str, earlier: Sequence[float], recent: Sequence[float]) -> QuantityDrift:
    """How far a quantity has moved from its earlier values to its recent ones."""
    enough = min(len(earlier), len(recent)) >= MIN_VALUES
    return QuantityDrift(
        name,
        len(earlier),
        len(recent),
        _mean(earlier),
        _mean(recent),
        round(population_stability(earlier, recent), 4) if enough else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
