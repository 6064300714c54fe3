"""Rows of many requests, computed together on one thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from jupyter_llmcloud.core.serving.models.batch_policy import BatchPolicy

QUEUE_FACTOR = 4
T = TypeVar("T")


class ComputesRows(Protocol):
    """What computes many rows in one call, such as a `Predictor`.

    Attributes:
        max_rows: of one call.
    """

    max_rows: int

    def predict(self, rows: list[Any]) -> list[Any]:
        """A result for each row; an exception in the place of one is of whoever asked for that row."""
        ...


class QueueFull(Exception):
    """More rows wait than may."""


@dataclass(eq=False)
class _Waiting:
    row: Any
    result: asyncio.Future[Any]
    since: float


class Batcher:
    """Computes rows in batches. Used from one event loop; the predictor from its one `thread` alone.

    Attributes:
        policy: decides when a batch is full enough.
        num_rows: computed since the start; num_batches: in so many calls.
    """

    def __init__(
        self, predictor: ComputesRows, max_queued: int, thread: ThreadPoolExecutor, max_wait_s: float = 0.02
    ) -> None:
        self._predictor = predictor
        self._max_queued = max_queued
        self.policy = BatchPolicy(max(1, predictor.max_rows), max_wait_s)
        self.num_rows = 0
        self.num_batches = 0
        self._queue: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._thread = thread
        self._task: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Rows that nobody computes yet."""
        return len(self._queue)

    async def compute(self, rows: list[Any]) -> list[Any]:
        """The result of each row, in order; whoever stops waiting takes its rows out of the queue.

        Raises QueueFull, and the first exception that stands in the place of a result. Rows that are more than may
        wait at all are let in when nobody else waits.
        """
        if self._queue and len(self._queue) + len(rows) > self._max_queued:
            raise QueueFull(f"{len(self._queue)} rows wait already, of at most {self._max_queued}")
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        mine = [_Waiting(row, loop.create_future(), now) for row in rows]
        self._queue.extend(mine)
        self.policy.arrived(now, len(rows))
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        try:
            results = await asyncio.gather(*(item.result for item in mine))
        except BaseException:
            for item in mine:
                item.result.cancel()
            raise
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    async def on_thread(self, work: Callable[[], T]) -> T:
        """Do something else with the model, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _run(self) -> None:
        """Compute until nothing waits."""
        while self._queue:
            await self._wait_for_more()
            batch = self._take()
            if not batch:
                continue
            began = time.monotonic()
            try:
                results = await self.on_thread(partial(self._predictor.predict, [item.row for item in batch]))
                if len(results) != len(batch):
                    raise RuntimeError(f"{len(results)} results for {len(batch)} rows")
            except asyncio.CancelledError:
                raise
            except Exception as error:
                results = [error] * len(batch)
            self.policy.computed(time.monotonic() - began)
            self.num_rows += len(batch)
            self.num_batches += 1
            for item, result in zip(batch, results, strict=True):
                if not item.result.done():
                    item.result.set_result(result)

    async def _wait_for_more(self) -> None:
        while self._queue:
            wait_s = self.policy.wait_s(len(self._queue), self._queue[0].since, time.monotonic())
            if wait_s <= 0:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._queue and len(batch) < self.policy.max_rows:
            item = self._queue.popleft()
            if not item.result.done():  # who asked has gone
                batch.append(item)
        return batch

    async def close(self) -> None:
        """Fail what waits; the thread ends after what it computes now."""
        self.stop()

    def stop(self) -> None:
        """The same, from where nothing can be awaited."""
        if self._task is not None:
            self._task.cancel()
        for item in self._queue:
            item.result.cancel()
        self._queue.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)
