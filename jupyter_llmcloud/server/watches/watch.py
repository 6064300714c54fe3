"""What one client has been told of a run that it watches, and what is next."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from jupyter_llmcloud.core.metrics.columns import Columns, MetricColumns
from jupyter_llmcloud.protocol.http.events import (
    RunGone,
    RunInfo,
    RunInfoChanged,
    RunOutput,
    RunSeries,
    SeriesTail,
    ServerMessage,
)
from jupyter_llmcloud.protocol.http.series import tail_of
from jupyter_llmcloud.server.watches.follower import RunFollower
from jupyter_llmcloud.server.watches.info import run_info
from jupyter_llmcloud.system.gil import with_short_intervals

RankFacts = Mapping[int, Mapping[str, Any]]  # of each rank's process, as fields of a RankInfo
BATCH_S = 0.1
INFO_S = 0.25
COST_SHARE = 4  # making batches for one run takes at most a fifth of the time
MAX_UNACKNOWLEDGED = 4
MESSAGE_COLUMNS = 10_000  # of all series in one message


class SharedColumns:
    """The columns of a run's series, made once for all clients that want equally many."""

    def __init__(self, follower: RunFollower) -> None:
        self._follower = follower
        self._by_limit: dict[int, MetricColumns] = {}
        self._ends = ""

    def of(self, limit: int) -> MetricColumns:
        """Those with at most so many columns, as they are now. The follower's guard is held."""
        metrics = self._follower.view.metrics
        if limit not in self._by_limit:
            self._by_limit[limit] = MetricColumns(metrics, limit)
            for name in metrics.series:
                self._by_limit[limit].dirty(name, -math.inf)
        ends = f"{sorted(self._follower.view.ranks.items())}"
        for name, series in metrics.series.items():
            if series.dirty_from < math.inf or ends != self._ends:
                for columns in self._by_limit.values():
                    columns.dirty(name, series.dirty_from)
                series.dirty_from = math.inf
        self._ends = ends
        columns = self._by_limit[limit]
        columns.update()
        return columns


class RunWatch:
    """One client's view of one run.

    Args:
        points: columns at most of each series.
        rank_facts: what is known of the ranks' processes.
    """

    def __init__(
        self,
        follower: RunFollower,
        columns: SharedColumns,
        points: int,
        rank_facts: Callable[[], RankFacts] = dict,
    ) -> None:
        self._follower = follower
        self._columns = columns
        self._points = points
        self._rank_facts = rank_facts
        self._seen = -1  # changes of the run that the client has been told
        self._has_more = False  # of them was not told for want of room or time
        self._due = 0.0
        self._info_due = 0.0
        self._version = 0
        self._output = 0
        self._info: RunInfo | None = None
        self._unacknowledged: deque[int] = deque()

    @property
    def run_id(self) -> str:
        """Of the run."""
        return self._follower.folder.run_id

    def acknowledge(self, cursor: int) -> None:
        """The client has dealt with everything up to this cursor."""
        while self._unacknowledged and self._unacknowledged[0] <= cursor:
            self._unacknowledged.popleft()

    def due_in(self, now: float) -> float | None:
        """Seconds until the next batch may be made; None while there is none, or the client is behind."""
        if self._seen == self._follower.num_changes and not self._has_more:
            return None
        if len(self._unacknowledged) >= MAX_UNACKNOWLEDGED and not self.is_gone:
            return None
        return max(0.0, self._due - now)

    @property
    def is_gone(self) -> bool:
        """Whether there is nothing left to watch."""
        return self._follower.is_gone

    async def take(self, cursor: int) -> list[ServerMessage]:
        """The next batch, under this cursor; empty when there is nothing to tell."""
        if self._follower.is_gone:
            return [RunGone(run_id=self.run_id)]
        self._seen, self._has_more = self._follower.num_changes, False
        if self._follower.record is None or self._is_loading():
            return []
        began = time.perf_counter()
        facts = self._rank_facts()
        async with self._follower.guard:
            batch = await asyncio.to_thread(with_short_intervals, self._make, cursor, facts)
        took = time.perf_counter() - began
        self._due = time.monotonic() + max(BATCH_S, COST_SHARE * took)
        if batch:
            self._unacknowledged.append(cursor)
        return batch

    def _is_loading(self) -> bool:
        """A run that has ended is told whole: not before all of it has been read."""
        return not self._follower.is_complete and not self._follower.view.is_active

    def _make(self, cursor: int, facts: RankFacts) -> list[ServerMessage]:
        return [*self._told_info(cursor, facts), *self._told_series(cursor), *self._told_output(cursor)]

    def _told_info(self, cursor: int, facts: RankFacts) -> list[ServerMessage]:
        now = time.monotonic()
        follower = self._follower
        is_over = self._info is not None and self._info.state != follower.view.state
        if now < self._info_due and not is_over:
            self._has_more = True
            return []
        self._info_due = now + INFO_S
        assert follower.record is not None
        info = run_info(
            follower.record,
            follower.view,
            time.time(),
            marks=follower.happened.marks,
            reports=follower.happened.reports,
            ranks=facts,
        )
        if (
            self._info is not None
            and _but_time(info) == _but_time(self._info)
            and info.elapsed_s - self._info.elapsed_s < 1
        ):
            return []
        self._info = info
        return [RunInfoChanged(run_id=self.run_id, cursor=cursor, info=info)]

    def _told_series(self, cursor: int) -> list[ServerMessage]:
        columns = self._columns.of(self._points)
        tails = [_tail(name, first, found) for name, first, found in columns.since(self._version)]
        self._version = columns.version
        messages: list[ServerMessage] = []
        part: list[SeriesTail] = []
        for tail in tails:
            part.append(tail)
            if sum(len(one.step) for one in part) >= MESSAGE_COLUMNS:
                messages.append(RunSeries(run_id=self.run_id, cursor=cursor, series=part))
                part = []
        return [*messages, RunSeries(run_id=self.run_id, cursor=cursor, series=part)] if part else messages

    def _told_output(self, cursor: int) -> list[ServerMessage]:
        records, skipped, self._output = self._follower.output.since(self._output)
        if self._output < self._follower.output.num_taken:
            self._has_more = True
        if not records and not skipped:
            return []
        return [RunOutput(run_id=self.run_id, cursor=cursor, records=records, skipped=skipped)]


def _but_time(info: RunInfo) -> tuple[Any, ...]:
    return tuple(getattr(info, name) for name in info.__struct_fields__ if name != "elapsed_s")


def _tail(name: str, first: int, columns: Columns) -> SeriesTail:
    points = columns.points[first:]
    return tail_of(name, points, first=first, is_partial=columns.is_partial, ranks=columns.ranks)
