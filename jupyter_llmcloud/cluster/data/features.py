"""Columns of numbers with mean 0 and standard deviation 1: their moments, partition by partition, and the schema.

The moments of parts are put together as in Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance (1983).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jupyter_llmcloud.errors import UsageError

_EPSILON = sys.float_info.epsilon
Moments = tuple[int, float, float]  # how many, their mean, the sum of squared differences from it


def moments(rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> dict[str, Moments]:
    """Of each column; null and NaN do not count. Raises UsageError for what is no number."""
    import numpy as np

    found = {}
    for name in columns:
        values = np.array([_number(row, name) for row in rows], np.float64)
        values = values[np.isfinite(values)]
        with np.errstate(over="ignore", invalid="ignore"):  # `statistics` says so
            mean = float(values.mean()) if values.size else 0.0
            found[name] = (int(values.size), mean, float(((values - mean) ** 2).sum()))
    return found


def _number(row: Mapping[str, Any], name: str) -> float:
    if name not in row:
        raise UsageError(f"normalize={name!r}: a row has no such column, but {', '.join(row)}.")
    value = row[name]
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"normalize={name!r}: the column holds {value!r:.40}, which is no number.")
    try:
        return float(value)
    except OverflowError:
        raise UsageError(f"normalize={name!r}: the column holds {value!r:.40}, which is too large.") from None


def together(parts: Iterable[Mapping[str, Moments]]) -> dict[str, Moments]:
    """The moments of parts as those of the whole."""
    whole: dict[str, Moments] = {}
    for part in parts:
        for name, (m, mean, squares) in part.items():
            n, before, sum_before = whole.get(name, (0, 0.0, 0.0))
            total, delta = n + m, mean - before
            if total:
                whole[name] = (
                    total,
                    before + delta * m / total,
                    sum_before + squares + delta * delta * n * m / total,
                )
    return whole


def statistics(whole: Mapping[str, Moments]) -> dict[str, list[float]]:
    """[mean, standard deviation] by column; a column that is always the same is only shifted.

    Raises UsageError for numbers whose squares are too large.
    """
    for name, (_, mean, squares) in whole.items():
        if not math.isfinite(mean) or not math.isfinite(squares):
            raise UsageError(
                f"normalize={name!r}: the column holds numbers too large to be squared (their mean is {mean:g}). "
                "Divide them first, or take their logarithm, in a step of your own."
            )
    return {name: [mean, _deviation(n, mean, squares)] for name, (n, mean, squares) in whole.items()}


def _deviation(n: int, mean: float, squares: float) -> float:
    """1 where there is no more of the squares than rounding leaves of values that are all the same."""
    rounded = 4 * n * _EPSILON * mean
    return math.sqrt(squares / n) if squares > rounded * rounded else 1.0


def normalized(row: dict[str, Any], known: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A row with these columns normalised; null stays null."""
    return {
        **row,
        **{
            name: None if row[name] is None else (_number(row, name) - mean) / deviation
            for name, (mean, deviation) in known.items()
        },
    }
