"""Where the topics come from: read again and again while somebody follows them, and at once when something was done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import msgspec
from tornado.log import app_log

from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.protocol.http.events import ID_FIELDS, Topic

if TYPE_CHECKING:
    from jupyter_llmcloud.server.events.hub import EventHub

_encode = msgspec.json.Encoder().encode


def encoded(topic: Topic, items: Iterable[msgspec.Struct]) -> dict[str, bytes]:
    """{id: JSON}."""
    return {str(getattr(item, ID_FIELDS[topic])): _encode(item) for item in items}


class TopicSource:
    """Reads a topic while somebody follows it.

    Args:
        read: gives all its items.
        every_s: how often, when nothing wakes it.
    """

    def __init__(
        self,
        hub: EventHub,
        topic: Topic,
        read: Callable[[], Awaitable[Iterable[msgspec.Struct]]],
        every_s: float,
    ) -> None:
        self.topic = topic
        self._hub = hub
        self._read = read
        self._every_s = every_s
        self._num_followers = 0
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def hold(self) -> None:
        """Somebody follows it."""
        self._num_followers += 1
        if self._task is None:
            self._task = asyncio.ensure_future(self._follow())

    def release(self) -> None:
        """One less follows it."""
        self._num_followers -= 1
        if not self._num_followers:
            self.stop()

    def stop(self) -> None:
        """Read it no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
            self._hub.rest(self.topic)

    @property
    def is_read(self) -> bool:
        """Whether somebody follows it."""
        return self._task is not None

    def wake(self) -> None:
        """Something was done that may have changed it."""
        self._woken.set()

    async def _follow(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self.look()
            except LLMCloudError as error:
                self._hub.fail(self.topic, str(error))
            except Exception as error:
                app_log.exception("%s cannot be read", self.topic)
                self._hub.fail(self.topic, f"{self.topic} cannot be read now: {type(error).__name__}: {error}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._woken.wait()

    async def look(self) -> None:
        """Read it once."""
        self._hub.replace(self.topic, encoded(self.topic, await self._read()))
