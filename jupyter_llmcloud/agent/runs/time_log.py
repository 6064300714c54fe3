"""Where the ranks of a run spend their time, kept in the run's folder and told to who follows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from jupyter_llmcloud.core.run.time_split import Split, TimeSplits
from jupyter_llmcloud.protocol.rank_messages import RankTimes

EVERY_S = 2.0
MIN_SECONDS = 1.0  # that a run lasts, before its record says where its time went


class TimeLog:
    """Of one run on its leading agent.

    Args:
        earlier: seconds by rank and part that another leader has counted.
        tell: called every other second with the shares of the last seconds and the seconds so far, by rank and part.
    """

    def __init__(
        self,
        earlier: Mapping[int, Mapping[str, float]],
        tell: Callable[[dict[int, Split], dict[int, Split]], None],
    ) -> None:
        self._splits = TimeSplits(earlier)
        self._has_earlier = bool(earlier)
        self._began = asyncio.get_running_loop().time()
        self._tell = tell
        self._attempt = 0
        self._unread: list[tuple[int, float, RankTimes]] = []  # a short run has ended before anybody asks
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, attempt: int, ranks: Iterable[int]) -> None:
        """An attempt begins on these ranks."""
        self._read()
        self._attempt = attempt
        self._splits.begin(ranks)

    def heard(self, rank: int, times: RankTimes, *, is_last: bool = False) -> None:
        """A rank says what it has spent; what one says as it ends is told when the others say what they do."""
        if times.attempt != self._attempt or not times.spent:
            return
        loop = asyncio.get_running_loop()
        self._unread.append((rank, loop.time(), times))
        if self._timer is None and not is_last:  # when the others have said it, too
            self._timer = loop.call_later(EVERY_S, self._say)

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for rank, at, times in unread:
            self._splits.heard(rank, at, times.spent, times.points)

    def _say(self) -> None:
        self._timer = None
        self._read()
        self._tell(self._splits.shares(), self.seconds())

    def seconds(self) -> dict[int, Split]:
        """By rank and part, so far; empty for a run that was too short to say."""
        if not self._has_earlier and asyncio.get_running_loop().time() - self._began < MIN_SECONDS:
            return {}
        self._read()
        found = self._splits.seconds()
        if all(sum(parts.values()) < MIN_SECONDS for parts in found.values()):
            return {}
        return {rank: {name: round(value, 3) for name, value in parts.items()} for rank, parts in found.items()}

    def close(self) -> None:
        """The run has ended."""
        if self._timer is not None:
            self._timer.cancel()
