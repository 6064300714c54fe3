"""What is heard of a trial while it runs: its values, told to the study, which may say that it is to end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.metrics.values import as_number
from jupyter_llmcloud.core.search.reported_steps import is_reported
from jupyter_llmcloud.errors import LLMCloudError


@dataclass
class Seen:
    """The metric of a trial, as its lowest rank logs it, and the names of all that was logged."""

    rank: int = -1
    count: int = 0
    value: float | None = None
    step: int | None = None
    names: dict[str, None] = field(default_factory=dict)


class TrialWatch:
    """Follows the metric of one trial.

    Args:
        metric: its name.
        report: tells the study values by step, and returns whether the trial is to end.
        stop: ends it.

    Attributes:
        seen: what was heard so far.
        is_pruned: whether the study has said so.
    """

    def __init__(
        self,
        metric: str,
        report: Callable[[list[tuple[int, float]]], Awaitable[bool]],
        stop: Callable[[], Awaitable[None]],
    ) -> None:
        self.seen = Seen()
        self.is_pruned = False
        self._metric = metric
        self._report = report
        self._stop = stop
        self._pending: list[tuple[int, float]] = []
        self._telling: asyncio.Task[None] | None = None
        self._error: LLMCloudError | None = None

    def on_values(self, rank: int, step: Any, values: dict[str, float]) -> None:
        """A rank has logged something."""
        seen = self.seen
        seen.names.update(dict.fromkeys(values))
        if self._metric not in values or (seen.rank >= 0 and rank > seen.rank):
            return
        if rank != seen.rank:  # a lower one logs it, too
            seen.rank, seen.count = rank, 0
        seen.value, seen.step = values[self._metric], _whole(step, seen.count)
        seen.count += 1
        if is_reported(seen.count - 1) and not self.is_pruned and self._error is None:
            self._pending.append((seen.step, seen.value))
            if self._telling is None or self._telling.done():
                self._telling = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        try:
            while self._pending and not self.is_pruned:
                values, self._pending = self._pending, []
                if await self._report(values):
                    self.is_pruned = True
                    await self._stop()
        except LLMCloudError as error:
            self._error = error

    async def settled(self) -> None:
        """Wait until the study knows all of it. Raises what the study refuses."""
        if self._telling is not None:
            await self._telling
        if self._error is not None:
            raise self._error


def _whole(step: Any, count: int) -> int:
    """A step as a study has it; of one that is no number, how many values were before."""
    number = None if step is None else as_number(step)
    return int(number) if number is not None and math.isfinite(number) else count
