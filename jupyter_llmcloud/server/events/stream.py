"""One client of the events: what it follows, and the one task that writes to it.

Nothing is queued for a client. When its connection takes more, it is told what it does not know by then: of topics
each changed item once, of a run that it watches one batch that joins all that has happened. So one that is slow, or
stands still, costs as much memory as any other, and holds nobody up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.http import events
from jupyter_llmcloud.protocol.http.events import (
    HEARTBEAT_S,
    MAX_POINTS,
    Ack,
    Alive,
    Changed,
    ClientMessage,
    MessageRefused,
    RunGone,
    ServerMessage,
    Snapshot,
    SubscribeTopics,
    UnsubscribeTopics,
    UnwatchRun,
    WatchRun,
)
from jupyter_llmcloud.server.events.hub import Subscription

if TYPE_CHECKING:
    from jupyter_llmcloud.server.events.service import EventService
    from jupyter_llmcloud.server.watches.watch import RunWatch

MAX_WATCHES = 200  # a notebook shows all of its runs at once
MAX_REFUSALS = 20  # that wait to be told


class _OwnedKey(msgspec.Struct):
    owner: str


_owner_of = msgspec.json.Decoder(_OwnedKey).decode


class EventStream:
    """One of them.

    Args:
        send: sends a text frame; done when the connection has taken it.
        url: of the models' API, as this client reaches it.
        owner: whose keys alone it is told of; None: everybody's.
    """

    def __init__(
        self,
        service: EventService,
        send: Callable[[bytes], Awaitable[None]],
        url: str = "",
        owner: str | None = None,
    ) -> None:
        self._service = service
        self._send = send
        self._url = url
        self._owner = owner
        self._subscription = Subscription(service.hub)
        self._watches: dict[str, RunWatch] = {}
        self._replies: list[ServerMessage] = []
        self._cursor = 0  # of the batches of watches
        self._woken = asyncio.Event()
        self._said_at = time.monotonic()

    # --- what the client says ---

    def receive(self, text: str | bytes) -> None:
        """A message of the client; one that is not understood is refused."""
        try:
            self._obey(events.read(text))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._refuse(f"this message is not understood: {error}.")
        except UsageError as error:
            self._refuse(str(error))
        self._woken.set()

    def _refuse(self, words: str) -> None:
        if len(self._replies) < MAX_REFUSALS:
            self._replies.append(MessageRefused(message=words))

    def _obey(self, message: ClientMessage) -> None:
        match message:
            case SubscribeTopics():
                for topic in message.topics:
                    if topic not in self._subscription.topics:
                        self._service.hold(topic)
                    self._subscription.follow(topic, message.epoch, message.cursor)
            case UnsubscribeTopics():
                for topic in message.topics:
                    if topic in self._subscription.topics:
                        self._subscription.leave(topic)
                        self._service.release(topic)
            case WatchRun():
                self._watch(message)
            case UnwatchRun():
                self._unwatch(message.run_id)
            case Ack():
                for watch in self._watches.values():
                    watch.acknowledge(message.cursor)

    def _watch(self, asked: WatchRun) -> None:
        if not 2 <= asked.points <= MAX_POINTS:
            raise UsageError(f"points={asked.points} is not possible: 2 to {MAX_POINTS}.")
        self._unwatch(asked.run_id)
        if len(self._watches) >= MAX_WATCHES:
            words = f"{MAX_WATCHES} runs are watched on this connection already: unwatch one of them."
            self._replies.append(MessageRefused(message=words, run_id=asked.run_id))
            return
        try:
            watch = self._service.watch(asked.run_id, asked.points, self._woken.set)
        except UsageError:  # it is no name of a run
            self._replies.append(RunGone(run_id=asked.run_id))
            return
        self._watches[asked.run_id] = watch

    def _unwatch(self, run_id: str) -> None:
        if self._watches.pop(run_id, None) is not None:
            self._service.unwatch(run_id, self._woken.set)

    # --- what it is told ---

    async def run(self) -> None:
        """Tell it everything, until cancelled."""
        hub = self._service.hub
        hub.listen(self._woken.set)
        try:
            await self._say([self._service.hello()])
            while True:
                self._woken.clear()
                replies, self._replies = self._replies, []
                await self._say([*replies, *self._subscription.take()])
                await self._tell_watches()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._next_due()):
                        await self._woken.wait()
                if time.monotonic() - self._said_at >= HEARTBEAT_S:
                    await self._say([Alive()])
        finally:
            hub.unlisten(self._woken.set)
            self._leave()

    async def _say(self, messages: list[ServerMessage]) -> None:
        for message in messages:
            if (shown := self._as_seen(message)) is not None:
                self._said_at = time.monotonic()
                await self._send(events.write(shown))

    def _as_seen(self, message: ServerMessage) -> ServerMessage | None:
        """Endpoints are known to all clients alike, but for the URL under which each reaches them; keys are not."""
        match message:
            case Snapshot(topic="keys"):
                return msgspec.structs.replace(message, items=[item for item in message.items if self._may_see(item)])
            case Changed(topic="keys"):
                return message if self._may_see(message.item) else None
            case Snapshot(topic="endpoints"):
                return msgspec.structs.replace(message, items=[self._with_url(item) for item in message.items])
            case Changed(topic="endpoints"):
                return msgspec.structs.replace(message, item=self._with_url(message.item))
        return message

    def _may_see(self, key: msgspec.Raw) -> bool:
        return self._owner is None or _owner_of(key).owner == self._owner

    def _with_url(self, item: msgspec.Raw) -> msgspec.Raw:
        return msgspec.Raw(msgspec.json.encode({**msgspec.json.decode(item), "url": self._url}))

    async def _tell_watches(self) -> None:
        for run_id, watch in list(self._watches.items()):
            if watch.due_in(time.monotonic()) == 0:
                self._cursor += 1
                await self._say(await watch.take(self._cursor))
            if watch.is_gone:
                self._unwatch(run_id)

    def _next_due(self) -> float:
        now = time.monotonic()
        due = [in_s for watch in self._watches.values() if (in_s := watch.due_in(now)) is not None]
        return min([*due, max(0.0, self._said_at + HEARTBEAT_S - now)])

    def _leave(self) -> None:
        for topic in self._subscription.topics:
            self._service.release(topic)
        for run_id in list(self._watches):
            self._unwatch(run_id)
