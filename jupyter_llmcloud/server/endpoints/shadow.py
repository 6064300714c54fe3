"""Copies of requests for a revision whose answers nobody gets: they are counted, and compared by their fate."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from jupyter_llmcloud.core.serving.endpoint.autoscaling import Smoothed
from jupyter_llmcloud.server.endpoints.replica_client import ReplicaLost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jupyter_llmcloud.server.endpoints.replica_client import ReplicaClient

MAX_AT_ONCE = 16
TIMEOUT_S = 300.0


@dataclass
class ShadowCounts:
    """What became of the copies; `num_dropped`: those for which there was no room, or no replica."""

    num_copied: int = 0
    num_failed: int = 0
    num_dropped: int = 0


class ShadowTraffic:
    """Sends copies, at most so many at once: it must never slow down what is answered."""

    def __init__(self) -> None:
        self.counts = ShadowCounts()
        self.duration = Smoothed()
        self._tasks: set[asyncio.Task[None]] = set()

    def copy(self, replicas: Sequence[ReplicaClient], path: str, body: bytes) -> None:
        """Ask one of the replicas the same; returns at once."""
        if not replicas or len(self._tasks) >= MAX_AT_ONCE:
            self.counts.num_dropped += 1
            return
        task = asyncio.ensure_future(self._ask(min(replicas, key=lambda one: one.num_in_flight), path, body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, replica: ReplicaClient, path: str, body: bytes) -> None:
        began, failed = time.monotonic(), True
        replica.enter()
        try:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            headers = {"Content-Type": "application/json"}
            with replica.use():
                async with replica.session.post(path, data=body, headers=headers, timeout=timeout) as response:
                    last = b""
                    async for chunk in response.content.iter_any():
                        last = chunk
                    failed = response.status >= 500 or b'data: {"error"' in last
        except (aiohttp.ClientError, OSError, ReplicaLost):
            pass
        finally:
            replica.leave()
            self.counts.num_copied += 1
            self.counts.num_failed += failed
            self.duration.add(time.monotonic() - began)

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
