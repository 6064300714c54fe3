"""Clients of the events that no websocket reaches: each has a stream like the others, and fetches what it is told.

An answer is kept until the client says that it has arrived; what comes meanwhile waits, and the stream with it, so that
a client that is slow to fetch is told less, as one on a slow websocket is.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tornado.log import app_log

from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.server.events.stream import EventStream

if TYPE_CHECKING:
    from jupyter_llmcloud.server.events.service import EventService

LEASE_S = 30.0
MAX_SESSIONS = 200
MAX_WAITING = 64  # messages


class PollSession:
    """One client.

    Args:
        url: of the models' API, as this client reaches it.
        on_end: called when its lease or its stream has ended.
        owner: whose keys alone it is told of; None: everybody's.
    """

    def __init__(self, service: EventService, url: str, on_end: Callable[[], None], owner: str | None = None) -> None:
        self._on_end = on_end
        self._waiting: list[bytes] = []
        self._answer: list[bytes] = []
        self._number = 0
        self._changed = asyncio.Condition()
        self._num_asked = 0  # of several requests at once the newest is answered
        self._stream = EventStream(service, self._send, url, owner)
        self._task = asyncio.ensure_future(self._run())
        self._lease: asyncio.TimerHandle | None = None

    async def ask(self, received: int, messages: Sequence[bytes], wait_s: float) -> tuple[int, list[bytes]]:
        """(the number of the answer, what the client does not know yet), within `wait_s`."""
        self._num_asked += 1
        asked = self._num_asked
        self._hold(wait_s + LEASE_S)
        for message in messages:
            self._stream.receive(message)
        async with self._changed:
            self._changed.notify_all()
            if received < self._number:
                return self._number, self._answer
            self._answer = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait_for(lambda: self._waiting or asked != self._num_asked)
            if self._waiting and asked == self._num_asked:
                self._answer, self._waiting = self._waiting, []
                self._number += 1
                self._changed.notify_all()
            return self._number, self._answer if asked == self._num_asked else []

    def end(self) -> None:
        """It is told nothing more."""
        self._task.cancel()
        if self._lease is not None:
            self._lease.cancel()
        self._on_end()

    def _hold(self, seconds: float) -> None:
        if self._lease is not None:
            self._lease.cancel()
        self._lease = asyncio.get_running_loop().call_later(seconds, self.end)

    async def _send(self, data: bytes) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._waiting) < MAX_WAITING)
            self._waiting.append(data)
            self._changed.notify_all()

    async def _run(self) -> None:
        try:
            await self._stream.run()
        except Exception:
            app_log.exception("the events of a client have failed")
            self.end()


class PollSessions:
    """All of them."""

    def __init__(self, service: EventService) -> None:
        self._service = service
        self._sessions: dict[str, PollSession] = {}

    def open(self, url: str, owner: str | None = None) -> str:
        """A new one; returns its name. Raises UsageError where there are too many."""
        if len(self._sessions) >= MAX_SESSIONS:
            raise UsageError(f"{MAX_SESSIONS} clients ask for events without a websocket already: close some pages.")
        name = secrets.token_urlsafe(24)
        self._sessions[name] = PollSession(self._service, url, lambda: self._forget(name), owner)
        return name

    def get(self, name: str) -> PollSession:
        """The one with this name, which nobody guesses. Raises NotFound where it has ended."""
        session = self._sessions.get(name)
        if session is None:
            raise NotFound("this session of events has ended: begin another one, with an empty session.")
        return session

    def __len__(self) -> int:
        return len(self._sessions)

    def close(self) -> None:
        """The server ends."""
        for session in list(self._sessions.values()):
            session.end()

    def _forget(self, name: str) -> None:
        self._sessions.pop(name, None)
