"""The requests that are being answered: counted, written down when over, and cut when that must be."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.serving.usage.rates import Answered, RateWindow
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.server.gateway.metrics import IN_FLIGHT, count_request, count_tokens
from jupyter_llmcloud.storage.server_state import RequestRecord

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.gateway.key_alerts import KeyMonitor
    from jupyter_llmcloud.server.gateway.key_quotas import KeyReservation
    from jupyter_llmcloud.storage.server_state import ServerState

KEY_CHECK_EVERY_S = 0.5
WRITE_EVERY_S = 0.5
CLOSE_TIMEOUT_S = 2.0
MAX_UNWRITTEN = 10_000
KEEP_S = 90 * 86400.0
PRUNE_EVERY_S = 3600.0
INFERENCE_ROUTES = ("completions", "chat/completions", "responses", "embeddings", "tokenize", "detokenize")


@dataclass(frozen=True)
class AbortReason:
    """Why a request is ended from here: how that is written down, and what the client is told, if it is there."""

    outcome: str
    status: int
    message: str = ""
    code: str = ""
    retry_after_s: float | None = None


HUNG_UP = AbortReason("hung up", 499)
KEY_REVOKED = AbortReason("key revoked", 401, "the key of this request is not valid any more.", "invalid_api_key")
# Clients ask again within a second or two by themselves, which is too soon for a server that starts.
RESTART_S = 5.0
RESTARTING = AbortReason(
    "server restarting", 503, "the server ends or restarts: ask again in a moment.", "server_restarting", RESTART_S
)


class RequestAborted(Exception):
    """The request is ended from here."""

    def __init__(self, cut: AbortReason) -> None:
        super().__init__(cut.outcome)
        self.cut = cut


@dataclass(eq=False)
class OpenRequest:
    """One request: whose key it came with, what that key was let in with, and how to cut it."""

    key_id: str | None = None
    reservation: KeyReservation | None = None
    cut_by: AbortReason | None = None
    has_begun: bool = False
    _task: asyncio.Task[Any] | None = field(default=None, repr=False)

    def cut(self, cut: AbortReason) -> None:
        """End it; the first reason counts."""
        if self.cut_by is None:
            self.cut_by = cut
            if self._task is not None:
                self._task.cancel()

    def give_back_unused(self) -> None:
        """What it was let in with is free again, if it never was one of those that are answered."""
        if self.reservation is not None and not self.has_begun:
            self.reservation.close()
            self.reservation.settle(0)

    @contextmanager
    def cuttable(self) -> Iterator[None]:
        """What is done inside ends with RequestCut when the request is cut."""
        if self.cut_by is not None:
            raise RequestAborted(self.cut_by)
        task = self._task = asyncio.current_task()
        assert task is not None
        num_cancelled = task.cancelling()
        try:
            yield
        except asyncio.CancelledError:
            if self.cut_by is None or task.uncancel() > num_cancelled:
                raise
            raise RequestAborted(self.cut_by) from None
        finally:
            self._task = None


def check_days(days: float) -> float:
    """How long usage is kept, as the server's configuration says. Raises UsageError."""
    if not days >= 1:  # the newest minute of a key tells what it may still ask; and NaN is no number of days
        raise UsageError(f"keep_usage_days = {days}: it must be at least 1; inf keeps everything.")
    return days


@dataclass
class UsageBook:
    """Where requests that have ended are written down, and for how long.

    Attributes:
        tell: is called with the requests that have been written.
        keep_s: how long their rows are kept; inf: for ever.
        then: is called when rows have been written.
    """

    state: ServerState
    tell: Callable[[Sequence[RequestRecord]], None]
    keep_s: float = KEEP_S
    then: Callable[[], None] = lambda: None
    _pruned_at: float = -math.inf

    async def write(self, records: Sequence[RequestRecord]) -> None:
        """Write these down. Raises sqlite3.Error, with nothing written."""
        await asyncio.to_thread(self.state.add_usage, list(records))
        self.then()
        self.tell(records)

    async def prune(self) -> None:
        """Forget what is old, when that has not been done of late. Raises sqlite3.Error."""
        if math.isfinite(self.keep_s) and time.monotonic() - self._pruned_at >= PRUNE_EVERY_S:
            self._pruned_at = time.monotonic()
            await asyncio.to_thread(self.state.prune_usage, time.time() - self.keep_s)


class OpenRequests:
    """All requests to endpoints of this server.

    Attributes:
        book: where they are written down when they have ended.
    """

    def __init__(
        self, state: ServerState, alerts: KeyMonitor, log: Logger, tell: Callable[[Sequence[RequestRecord]], None]
    ) -> None:
        self.book = UsageBook(state, tell)
        self._state = state
        self.alerts = alerts
        self.log = log
        self._open: set[OpenRequest] = set()
        self._none_open = asyncio.Event()
        self._records: list[RequestRecord] = []
        self._one_writes = asyncio.Lock()
        self._counting: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._closing = False

    def after_writing(self, then: Callable[[], None]) -> None:
        """Have this called whenever rows of usage have been written."""
        self.book.then = then

    def keep(self, days: float) -> None:
        """Keep rows of usage for so long. Raises UsageError."""
        self.book.keep_s = check_days(days) * 86400

    @property
    def is_closing(self) -> bool:
        """Whether requests are cut, since the server ends."""
        return self._closing

    def begin(self, request: OpenRequest) -> None:
        """A request is let in."""
        request.has_begun = True
        self._open.add(request)
        IN_FLIGHT.inc()
        if self._closing:
            request.cut(RESTARTING)
        if request.key_id is not None and (self._watching is None or self._watching.done()):
            self._watching = asyncio.ensure_future(self._watch())

    def end(
        self,
        request: OpenRequest,
        record: RequestRecord,
        usage: Awaitable[dict[str, int] | None] | None = None,
        rates: RateWindow | None = None,
    ) -> None:
        """A request is over, however it ended. `usage` tells its tokens when the answer did not.

        `rates`: of the endpoint that it asked.
        """
        self._open.discard(request)
        if not self._open:
            self._none_open.set()
        IN_FLIGHT.dec()
        if request.reservation is not None:
            request.reservation.close()
        count_request(record)
        if usage is None:
            self._settle(request, record, rates, is_known=True)
            return
        task = asyncio.ensure_future(self._count(request, record, usage, rates))
        self._counting.add(task)
        task.add_done_callback(self._counting.discard)

    async def _count(
        self,
        request: OpenRequest,
        record: RequestRecord,
        usage: Awaitable[dict[str, int] | None],
        rates: RateWindow | None,
    ) -> None:
        counted = await usage or {}
        prompt, completion = counted.get("prompt_tokens"), counted.get("completion_tokens")
        record = dataclasses.replace(record, prompt_tokens=prompt, completion_tokens=completion)
        self._settle(request, record, rates, is_known=bool(counted))

    def _settle(self, request: OpenRequest, record: RequestRecord, rates: RateWindow | None, is_known: bool) -> None:
        """What the request has cost is known, or will never be."""
        num_tokens = (record.prompt_tokens or 0) + (record.completion_tokens or 0)
        if request.reservation is not None:
            request.reservation.settle(num_tokens if is_known else None)
        if request.key_id is not None:
            self.alerts.spent(request.key_id, num_tokens)
        count_tokens(record)
        if rates is not None:
            tokens = record.completion_tokens or 0
            rates.add(Answered(t=record.t, status=record.status, first_byte_s=record.first_byte_s, num_tokens=tokens))
        self.write_down(record)

    def write_down(self, record: RequestRecord) -> None:
        """Keep a record, with others that come soon; also of a request that was refused before it was begun."""
        self._records.append(record)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.ensure_future(self._write_soon())

    def check_keys(self) -> None:
        """Cut the requests whose key is not valid any more."""
        now = time.time()
        for request in list(self._open):
            if request.key_id is not None:
                key = self._state.key(request.key_id)
                if key is None or not key.is_valid(now):
                    request.cut(KEY_REVOKED)

    async def _watch(self) -> None:
        # Another server of the same user may have revoked a key, and any key may expire.
        while any(request.key_id is not None for request in self._open):
            await asyncio.sleep(KEY_CHECK_EVERY_S)
            try:
                self.check_keys()
            except sqlite3.Error as error:  # the next look may be possible; without one, a revoked key would stream on
                self.log.error("whether keys are valid still cannot be looked up: %s", error)

    async def _write_soon(self) -> None:
        while self._records:
            await asyncio.sleep(WRITE_EVERY_S)
            await self._write()

    async def write(self) -> None:
        """Write down the requests that have ended, with what they have cost."""
        if self._counting:
            await asyncio.wait(self._counting)
        await self._write()

    async def _write(self) -> None:
        # Whoever asks for it may be cancelled, as is done when the server ends: the rows are written all the same.
        await asyncio.shield(asyncio.ensure_future(self._write_in_turn()))

    async def _write_in_turn(self) -> None:
        async with self._one_writes:  # who comes meanwhile waits: what is being written is not there yet
            await self._write_records()

    async def _write_records(self) -> None:
        records, self._records = self._records, []
        if not records:
            return
        try:
            await self.book.write(records)
        except sqlite3.Error as error:  # a full disk: they are written when there is room again
            self.log.error("%s requests are not written down yet: %s", len(records), error)
            self._records = [*records, *self._records][-MAX_UNWRITTEN:]
            return
        try:
            await self.book.prune()
        except sqlite3.Error as error:
            self.log.error("old rows of usage are not removed yet: %s", error)

    async def close(self) -> None:
        """The server ends: tell those who wait for an answer, lose no row."""
        self._closing = True
        self._none_open.clear()
        for request in list(self._open):
            request.cut(RESTARTING)
        if self._open:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._none_open.wait()
            except TimeoutError:
                self.log.warning("%s requests did not end in time", len(self._open))
        for task in (self._watching, self._writing):
            if task is not None:
                task.cancel()
        await self.write()
