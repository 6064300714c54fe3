"""A stretch of a metric, for a chart that is zoomed: so many columns, exact where there are few values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from jupyter_llmcloud.core.metrics.series import Point
from jupyter_llmcloud.protocol.http.base import Query, Response
from jupyter_llmcloud.protocol.http.events import SeriesTail

Steps = Annotated[float | None, Meta(description="A step; where it is left out, there is no bound.")]


class SeriesQuery(Query, frozen=True, rename={"from_": "from"}):
    """Which stretch."""

    metric: Annotated[str, Meta(description="Its name.")]
    from_: Steps = None
    to: Steps = None
    points: Annotated[int, Meta(ge=2, le=5000, description="Columns at most, of each rank.")] = 500
    by: Annotated[Literal["mean", "rank"], Meta(description="The mean over the ranks, or each of them.")] = "mean"


class SeriesColumns(msgspec.Struct, kw_only=True, frozen=True):
    """Columns in order of their steps. `mean`, `low` and `high` are null where all values are NaN or infinite."""

    step: Annotated[list[float], Meta(description="In the middle of each column.")]
    time: Annotated[list[float], Meta(description="Of its last value, seconds since the epoch.")]
    epoch: Annotated[list[float | None], Meta(description="The value of the metric `epoch` then.")]
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]
    n: Annotated[list[int], Meta(description="How many ranks have a value there.")]
    not_finite: Annotated[list[int], Meta(description="How many values were NaN or infinite.")]
    is_exact: Annotated[bool, Meta(description="Whether each column is one step.")] = False


class SeriesWindow(Response, frozen=True):
    """A stretch of a metric."""

    metric: str
    by: Literal["mean", "rank"]
    columns: Annotated[dict[str, SeriesColumns], Meta(description='Under "mean"; or of each rank, under its number.')]


def tail_of(
    name: str,
    points: Sequence[Point],
    *,
    first: int = 0,
    is_partial: bool = False,
    ranks: Sequence[int] = (),
    shown: Callable[[float | None], float | None] = lambda value: value,
) -> SeriesTail:
    """These points as the columns of a metric from `first` on; `shown` is what is told of a value."""
    return SeriesTail(
        name=name,
        from_=first,
        step=[point.step for point in points],
        time=[point.time for point in points],
        epoch=[point.epoch for point in points],
        mean=[shown(point.mean) for point in points],
        low=[shown(point.low) for point in points],
        high=[shown(point.high) for point in points],
        n=[point.num_ranks for point in points],
        not_finite=[point.num_not_finite for point in points],
        is_partial=is_partial,
        ranks=list(ranks),
    )
