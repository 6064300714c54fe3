"""What is said of a metric: of how many ranks it is the mean, what each of them has, since when it is NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jupyter_llmcloud.core.metrics.not_finite import NotFinite, word
from jupyter_llmcloud.core.metrics.series import Point, Series
from jupyter_llmcloud.core.names import name_ranks, short_name
from jupyter_llmcloud.core.output.numerals import format_count, format_number

MAX_RANKS = 16
MAX_METRICS = 2


def last_value(series: Series) -> str:
    """`1.41`, `NaN`."""
    return point_value(series, series.last)


def value_text(value: float) -> str:
    """`1.41`, `NaN`, `infinite`."""
    return format_number(value) if math.isfinite(value) else word(value)


def point_value(series: Series, point: Point | None) -> str:
    """The mean at a point; of one that is not finite, what it is."""
    if point is None:
        return ""
    return series.not_finite.word if point.mean is None else format_number(point.mean)


def mean_of(series: Series) -> str:
    """`mean of 2 ranks`; "" where the value is one rank's."""
    point = series.last
    return f"mean of {point.num_ranks} ranks" if point is not None and point.num_ranks > 1 else ""


def rank_values(series: Series, limit: int = MAX_RANKS) -> str:
    """`rank 0: 1.38 · rank 1: 1.44`; "" for one rank, a word where all have the same."""
    ranks = series.ranks
    if len(ranks) < 2:
        return ""
    texts = {rank: value_text(value.value) for rank, value in ranks.items()}
    steps = {value.step for value in ranks.values()}
    if len(set(texts.values())) == 1 and len(steps) == 1:
        return f"the same on each of {len(ranks)} ranks"
    newest = max(steps)
    words = [
        f"rank {rank}: {texts[rank]}{'' if value.step == newest else f' (step {format_count(value.step)})'}"
        for rank, value in ranks.items()
    ]
    return " · ".join([*words[:limit], *([f"… {len(words) - limit} more"] if len(words) > limit else [])])


def waiting_for(series: Series) -> str:
    """`waits for rank 1, at step 20`, when others are far ahead."""
    behind = series.behind
    return f"waits for {name_ranks(behind)}, at step {format_count(series.reached)}" if behind else ""


def since_when(found: NotFinite, num_ranks: int) -> str:
    """`NaN since step 60`, `NaN on rank 1 since step 60`; "" when the newest values are finite."""
    if not (ranks := found.ranks):
        return ""
    where = f" on {name_ranks(ranks)}" if len(ranks) < num_ranks else ""
    return f"{found.word}{where} since step {format_count(found.since)}"


def warning(series: Series) -> str:
    """`NaN since step 60 · 40 not finite, first at step 60`; "" when all values were finite."""
    found = series.not_finite
    if not found.count:
        return ""
    counted = f"{found.count:,} not finite, first at step {format_count(found.first)}"
    return " · ".join(filter(None, (since_when(found, len(series.ranks)), counted)))


def alarms(series: Mapping[str, Series]) -> list[str]:
    """`loss is NaN since step 60` for each metric that is so now."""
    found = ((name, since_when(one.not_finite, len(one.ranks))) for name, one in series.items())
    return _some([f"{short_name(name)} is {words}" for name, words in found if words])


def not_finite_word(value: str | None) -> str:
    """The word for "nan", "inf" or "-inf", as the server names a value that JSON has no number for."""
    return "infinite" if value in ("inf", "-inf") else "NaN"


def _some(words: list[str]) -> list[str]:
    more = len(words) - MAX_METRICS
    return [*words[:MAX_METRICS], f"{more} more metrics are not finite"] if more > 0 else words
