"""Answers that are given again, in a Redis or Valkey that several servers may share.

A cache may be slow, full, gone or wrong, and no request fails for that: what cannot be had at once is answered by a
replica, and a cache that does not answer is left alone for a while.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client import Counter

if TYPE_CHECKING:
    from logging import Logger

TIMEOUT_S = 0.1
MAX_FAILURES = 3  # in a row; then it is left alone
PAUSE_S = 10.0
PREFIX = "llmcloud:answer:1:"
LOOKUPS = Counter("llmcloud_response_cache_total", "Requests that could be answered from the cache", ["outcome"])


class CachedAnswer(msgspec.Struct, array_like=True, frozen=True):
    """An answer as it was given: its media type and its bytes."""

    content_type: str
    body: bytes


class ResponseCache:
    """The cache of one server.

    Args:
        url: redis://, rediss://, unix:// or valkey://; "" keeps nothing.
        ttl_s: how long an answer is kept.
    """

    def __init__(self, url: str, ttl_s: float, log: Logger) -> None:
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._log = log
        self._num_failures = 0
        self._paused_until = 0.0
        self._client = self._connect(url) if url else None
        self._writing: set[asyncio.Task[None]] = set()

    def _connect(self, url: str) -> Any:
        try:
            from redis import asyncio as redis
        except ImportError:
            self._log.warning("no response cache: pip install 'jupyter-llmcloud[cache]' (package redis).")
            return None
        url = url.replace("valkeys://", "rediss://", 1).replace("valkey://", "redis://", 1)
        try:
            return redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        except ValueError as error:
            self._log.warning("no response cache: its URL cannot be used: %s", error)
            return None

    @property
    def is_on(self) -> bool:
        """Whether it is worth asking."""
        return self._client is not None and time.monotonic() >= self._paused_until

    async def get(self, key: str) -> CachedAnswer | None:
        """The answer that is kept there."""
        found = await self._try(lambda client: client.get(PREFIX + key))
        try:
            answer = None if found is None else msgspec.msgpack.decode(found, type=CachedAnswer)
        except msgspec.MsgspecError:
            answer = None
        LOOKUPS.labels("miss" if answer is None else "hit").inc()
        return answer

    def put(self, key: str, answer: CachedAnswer) -> None:
        """Keep an answer, beside what else is done."""
        value = msgspec.msgpack.encode(answer)
        task = asyncio.ensure_future(self._try(lambda client: client.set(PREFIX + key, value, px=self._ttl_ms)))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _try(self, ask: Any) -> Any:
        if not self.is_on:
            return None
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                found = await ask(self._client)
        except Exception as error:  # whatever a cache does, the request goes on
            self._note_failure(error)
            return None
        self._num_failures = 0
        return found

    def _note_failure(self, error: Exception) -> None:
        LOOKUPS.labels("error").inc()
        self._num_failures += 1
        if self._num_failures >= MAX_FAILURES:
            self._num_failures = 0
            self._paused_until = time.monotonic() + PAUSE_S
            what = str(error) or type(error).__name__
            self._log.warning("the response cache is left alone for %g s: %s", PAUSE_S, what)

    async def close(self) -> None:
        """The server ends."""
        if self._writing:
            await asyncio.wait(self._writing)
        if self._client is not None:
            await self._client.aclose()
