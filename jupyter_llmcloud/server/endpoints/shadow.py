"""Copies of requests for a revision whose answers nobody gets: compared with those of the revision that answers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

from jupyter_llmcloud.core.serving.endpoint.comparison import Comparison, RevisionAnswer, has_one_answer, read_answer
from jupyter_llmcloud.server.endpoints.replica_client import ReplicaLost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jupyter_llmcloud.server.endpoints.replica_client import ReplicaClient

MAX_AT_ONCE = 16
TIMEOUT_S = 300.0
MAX_ANSWER = 1 << 20  # bytes; a longer one is not compared


@dataclass
class ShadowCounts:
    """What became of the copies; `num_dropped`: those for which there was no room, or no replica."""

    num_copied: int = 0
    num_failed: int = 0
    num_dropped: int = 0


class ShadowCopy:
    """One request that both revisions got. It is noted when both have answered."""

    def __init__(self, comparison: Comparison, path: str, body: bytes) -> None:
        self._comparison = comparison
        self._has_one_answer = has_one_answer(path, body)
        self._tried: RevisionAnswer | None = None
        self._stable: RevisionAnswer | None = None

    def answered(self, seconds: float, failed: bool, content_type: str, body: bytes | None) -> None:
        """The revision that answers has done so."""
        self._stable = RevisionAnswer(
            seconds, failed, read_answer(content_type, body) if self._has_one_answer else None
        )
        self._note()

    def tried(self, seconds: float, failed: bool, content_type: str, body: bytes | None) -> None:
        """The shadow has answered."""
        self._tried = RevisionAnswer(seconds, failed, read_answer(content_type, body) if self._has_one_answer else None)
        self._note()

    def _note(self) -> None:
        if self._tried is not None and self._stable is not None:
            self._comparison.note(self._tried, self._stable, self._has_one_answer)


class ShadowTraffic:
    """Sends copies, at most so many at once: it must never slow down what is answered."""

    def __init__(self) -> None:
        self.counts = ShadowCounts()
        self.comparison = Comparison()
        self._revision = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, revision: int) -> ShadowTraffic:
        """Counted for this revision; what was counted for another one is forgotten."""
        if revision != self._revision:
            self._revision, self.counts, self.comparison = revision, ShadowCounts(), Comparison()
        return self

    def told(self) -> dict[str, Any]:
        """What became of the copies, and how the answers compare."""
        return {**self.comparison.told(), "num_dropped": self.counts.num_dropped}

    def copy(self, replicas: Sequence[ReplicaClient], path: str, body: bytes) -> ShadowCopy | None:
        """Ask one of the replicas the same; returns at once, None when it is not asked."""
        if not replicas or len(self._tasks) >= MAX_AT_ONCE:
            self.counts.num_dropped += 1
            return None
        copy = ShadowCopy(self.comparison, path, body)
        replica = min(replicas, key=lambda one: one.num_in_flight)
        task = asyncio.ensure_future(self._ask(replica, path, body, copy, self.counts))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return copy

    async def _ask(
        self, replica: ReplicaClient, path: str, body: bytes, copy: ShadowCopy, counts: ShadowCounts
    ) -> None:
        began, failed, content_type = time.monotonic(), True, ""
        answer = bytearray()
        replica.enter()
        try:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            headers = {"Content-Type": "application/json"}
            with replica.use():
                async with replica.session.post(path, data=body, headers=headers, timeout=timeout) as response:
                    content_type = response.content_type
                    last = b""
                    async for chunk in response.content.iter_any():
                        last = chunk
                        if len(answer) <= MAX_ANSWER:
                            answer += chunk
                    failed = response.status >= 500 or b'data: {"error"' in last
        except (aiohttp.ClientError, OSError, ReplicaLost):
            pass
        finally:
            replica.leave()
            counts.num_copied += 1
            counts.num_failed += failed
        whole = bytes(answer) if len(answer) <= MAX_ANSWER else None
        copy.tried(time.monotonic() - began, failed, content_type, whole)

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
