"""Kept connections to a replica: HTTP/1.1 over its unix socket, as little of it as one request at a time needs.

A general client takes as long for its own housekeeping as the rest of the gateway. The replica is our own process
on the same machine: no redirects, cookies, proxies or compression here. Whatever it sends that is not HTTP/1.1
breaks the answer, and the connection is closed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal

CONNECT_TIMEOUT_S = 5.0
KEEP_S = 60.0  # an idle one; the replica keeps it longer
MAX_HEAD = 1 << 16
MAX_SIZE_LINE = 12  # of a chunk that is as long as a piece of a stream
MAX_LINE = 1 << 10  # before a chunk, and behind the last one
_HEXADECIMAL = frozenset(b"0123456789abcdefABCDEF")
READ_BYTES = 1 << 18  # at once, as asyncio does
MAX_BUFFERED = 1 << 18  # what is not yet taken; the replica waits with more


Take = Callable[[bytes], bool]  # gets a piece; whether another one can be taken
Begun = Callable[["ReplicaAnswer"], Take | None]  # gets an answer of which something has come; who takes that


class ReplicaUnreachable(OSError):
    """There is no connection to the replica: the request was not delivered."""


class BrokenAnswer(OSError):
    """The replica ended the connection within its answer, or before it."""


class ReplicaAnswer:
    """The answer to one request, as far as it has come.

    Attributes:
        status: of HTTP.
        headers: by their names in lower case; of one that came twice, the last value.
    """

    def __init__(self, connection: ReplicaConnection, status: int, headers: Mapping[str, str]) -> None:
        self._connection = connection
        self.status = status
        self.headers = headers

    @property
    def content_type(self) -> str:
        """Without its parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def takes_more(self) -> bool:
        """Whether whoever was handed what has come can take more of it."""
        return not self._connection.is_full

    async def readany(self) -> bytes:
        """What has come since the last call, at least one byte; nothing at the end. Raises BrokenAnswer."""
        return await self._connection.read_some()

    async def read(self) -> bytes:
        """The rest of it. Raises BrokenAnswer."""
        pieces = []
        while piece := await self._connection.read_some():
            pieces.append(piece)
        return b"".join(pieces)

    async def copy_to(self, take: Take) -> bool:
        """Hand the rest of it to `take`, each piece in the moment in which it comes. Raises BrokenAnswer.

        Returns True at its end; False when `take` has said, by False, that it can take no more for now.
        """
        return await self._connection.copy_to(take)


class ReplicaConnection(asyncio.BufferedProtocol):
    """One connection, with one request at a time.

    Args:
        buffer: into which it is read. It may be that of other connections too: what is read is taken out at once.

    Attributes:
        idle_since: on the clock of `time.monotonic`, while it is kept for the next request.
        is_paused: whether the replica has to wait until more of its answer is taken.
        is_full: whether who takes the answer has said that it can take no more for now.
    """

    def __init__(self, buffer: bytearray) -> None:
        self.idle_since = 0.0
        self._buffer = memoryview(buffer)
        self._transport: asyncio.Transport | None = None
        self._decoder = AnswerDecoder()
        self._wanted: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._take: Take | None = None  # gets what comes, without a task that would be woken for it
        self._begun: Begun | None = None
        self.is_full = False
        self.is_paused = False

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent: the last answer is complete, and both ends keep the connection."""
        return self._error is None and self._decoder.is_complete and self._decoder.keeps

    def send(self, request: bytes, begun: Begun | None = None) -> None:
        """Send a request. `begun`: is called when there is some of a body; what it returns gets that and the rest."""
        assert self._transport is not None
        self._decoder = AnswerDecoder()
        self._begun, self._take, self.is_full = begun, None, False
        if self.is_paused:  # whoever asked before may have gone before all of the answer was taken
            self._go_on()
        self._transport.write(request)

    async def answer(self) -> ReplicaAnswer:
        """What is answered, once something of the body is there, too, or its end. Raises BrokenAnswer.

        Of one whose body is taken as it comes: once that can go no further, or has ended.
        """
        try:
            while not (self._decoder.has_begun or self._take is not None):
                await self._more()
        finally:
            self._begun = self._take = None
        return ReplicaAnswer(self, self._decoder.status, self._decoder.headers)

    async def read_some(self) -> bytes:
        """What of the body has come; nothing at its end. Raises BrokenAnswer."""
        while not (piece := self._decoder.take()):
            if self._decoder.is_complete:
                return b""
            await self._more()
        self._go_on()
        return piece

    async def copy_to(self, take: Take) -> bool:
        """As that of `ReplicaAnswer`."""
        while True:
            if piece := self._decoder.take():
                self._go_on()
                if not take(piece):
                    return False
            elif self._decoder.is_complete:
                return True
            elif await self._handed_on(take):
                return False

    async def _handed_on(self, take: Take) -> bool:
        """Have `take` called with what comes, until it ends or `take` can take no more: True."""
        self._take, self.is_full = take, False
        try:
            await self._more()
        finally:
            self._take = None
        return self.is_full

    def _go_on(self) -> None:
        if self.is_paused:
            self.is_paused = False
            assert self._transport is not None
            self._transport.resume_reading()

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._wanted = asyncio.get_running_loop().create_future()
        try:
            await self._wanted
        finally:
            self._wanted = None

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.abort()

    # --- what the loop tells ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where it is read into: memory for each reading would take as long to be had as all that is done with it."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """More of the answer."""
        try:
            self._decoder.feed(bytes(self._buffer[:nbytes]))
        except ValueError as error:
            self._fail(BrokenAnswer(f"what it answered is no HTTP: {error}"))
            self.close()
            return
        if self._begun is not None and self._decoder.has_body:
            self._take = self._begins(self._begun)
        if self._take is not None and self._hand_on(self._take):
            return
        if self._decoder.num_buffered > MAX_BUFFERED and not self.is_paused and self._transport is not None:
            self.is_paused = True
            self._transport.pause_reading()
        if self._take is not None or self._decoder.has_begun:
            self._wake()

    def _begins(self, begun: Begun) -> Take | None:
        self._begun = None
        try:
            return begun(ReplicaAnswer(self, self._decoder.status, self._decoder.headers))
        except Exception as error:  # theirs: raised where it is waited
            self._fail(error)
            return None

    def _hand_on(self, take: Take) -> bool:
        """Whether whoever waits has nothing to do yet."""
        piece = self._decoder.take()
        try:
            self.is_full = bool(piece) and not take(piece)
        except Exception as error:  # theirs: raised where it is waited
            self._fail(error)
        return not (self.is_full or self._decoder.is_complete)

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed. An answer that says no length ends so."""
        self._decoder.end()
        self._fail(BrokenAnswer(f"it closed the connection{f' ({error})' if error is not None else ''}"))

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)


def _whole_chunk(raw: bytes, at: int) -> tuple[int, int] | None:
    """Where the data of a chunk is that begins here and has come whole, as most do; None: look closer."""
    line_ends = raw.find(b"\r\n", at, at + MAX_SIZE_LINE)
    size = _plain_size(raw[at:line_ends]) if line_ends > at else 0
    begins = line_ends + 2
    ends = begins + size
    return (begins, ends) if size and raw[ends : ends + 2] == b"\r\n" else None


@lru_cache(maxsize=1000)  # pieces of a stream are about as long as each other
def _plain_size(told: bytes) -> int:
    """Of a chunk; 0: the last one, or one that must be looked at."""
    return 0 if set(told) - _HEXADECIMAL else int(told, 16)


class AnswerDecoder:
    """Bytes of an HTTP/1.1 answer to its status, headers and body.

    Attributes:
        status: 0 until the head is complete.
        headers: by their names in lower case.
        is_complete: whether all of the body has come.
        keeps: whether the connection may be used again.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_complete = False
        self.keeps = True
        self._raw = b""
        self._body: list[bytes] = []
        self._left: int | None = None  # of the body, or of the chunk, to come; None: until the connection ends
        self._is_chunked = False
        self._next: Literal["size", "data", "break", "trailer"] = "size"  # of what is chunked

    @property
    def has_begun(self) -> bool:
        """Whether there is something to pass on, or nothing will come."""
        return self.status > 0 and (bool(self._body) or self.is_complete)

    @property
    def has_body(self) -> bool:
        """Whether some of it has come that nobody has taken."""
        return bool(self._body)

    @property
    def num_buffered(self) -> int:
        """Bytes of the body that nobody has taken."""
        return sum(map(len, self._body))

    def take(self) -> bytes:
        """What of the body has come since the last call."""
        if len(self._body) == 1:
            return self._body.pop()
        body, self._body = b"".join(self._body), []
        return body

    def feed(self, data: bytes) -> None:
        """More of it. Raises ValueError for what is no answer of HTTP/1.1."""
        if self.is_complete:
            raise ValueError("bytes behind the end of an answer")
        self._raw = self._raw + data if self._raw else data
        while self.status == 0:
            if not self._read_head():
                return
        if self._is_chunked:
            self._read_chunks()
        elif self._raw:
            self._take_plain()

    def end(self) -> None:
        """No more comes."""
        self.keeps = False
        if self.status and self._left is None and not self._is_chunked:
            self.is_complete = True

    def _read_head(self) -> bool:
        head, separator, rest = self._raw.partition(b"\r\n\r\n")
        if not separator:
            if len(self._raw) > MAX_HEAD:
                raise ValueError(f"a head of more than {MAX_HEAD} bytes")
            return False
        self._raw = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, told = first.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not told[:3].isdigit():
            raise ValueError(f"it begins with {first[:40]!r}")
        status = int(told[:3])
        if status < 200:
            return True  # more is to come: another head
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        self.status = status
        self._begin_body(version)
        return True

    def _begin_body(self, version: str) -> None:
        kept = self.headers.get("connection", "").lower()
        self.keeps = kept != "close" and (version == "HTTP/1.1" or kept == "keep-alive")
        self._is_chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if self._is_chunked:
            self._left = 0
        elif "transfer-encoding" in self.headers:
            raise ValueError(f"its transfer encoding is {self.headers['transfer-encoding'][:40]!r}")
        elif self.status in (204, 304):
            self._left, self.is_complete = 0, True
        elif (length := self.headers.get("content-length")) is not None:
            if not (length.isascii() and length.isdigit()):
                raise ValueError(f"its length is {length[:40]!r}")
            self._left = int(length)
            self.is_complete = self._left == 0

    def _take_plain(self) -> None:
        data, self._raw = self._raw, b""
        if self._left is not None:
            if len(data) > self._left:
                raise ValueError("more than its length")
            self._left -= len(data)
            self.is_complete = self._left == 0
        self._body.append(data)

    def _read_chunks(self) -> None:
        raw, position = self._raw, 0
        while not self.is_complete:
            if self._next == "size" and (whole := _whole_chunk(raw, position)) is not None:
                begins, ends = whole
                self._body.append(raw[begins:ends])
                position = ends + 2
            elif self._next == "data":
                piece = raw[position : position + (self._left or 0)]
                if not piece:
                    break
                self._take_piece(piece)
                position += len(piece)
            elif (ends := raw.find(b"\r\n", position)) >= 0:
                self._take_line(raw[position:ends])
                position = ends + 2
            elif len(raw) - position > MAX_LINE:
                raise ValueError(f"a line of more than {MAX_LINE} bytes between chunks")
            else:
                break
        self._raw = raw[position:]
        if self.is_complete and self._raw:
            raise ValueError("bytes behind the end of an answer")

    def _take_piece(self, piece: bytes) -> None:
        assert self._left is not None
        self._body.append(piece)
        self._left -= len(piece)
        if self._left == 0:
            self._next = "break"

    def _take_line(self, line: bytes) -> None:
        if self._next == "break":
            if line:
                raise ValueError("a chunk longer than it said")
            self._next = "size"
        elif self._next == "trailer":
            self.is_complete = not line
        else:
            size = line.partition(b";")[0].strip()
            if not size or set(size) - _HEXADECIMAL:
                raise ValueError(f"a chunk of size {size[:20]!r}")
            self._left = int(size, 16)
            self._next = "data" if self._left else "trailer"


class ReplicaConnections:
    """Those that are kept to one replica.

    Args:
        path: of its socket.
        headers: of every request.
    """

    def __init__(self, path: str, headers: Mapping[str, str]) -> None:
        self._path = path
        self._head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "replica", **headers}.items())
        self._num_lines = 1 + len(headers)
        self._idle: list[ReplicaConnection] = []
        self._buffer = bytearray(READ_BYTES)
        self._is_closed = False

    def take_idle(self) -> ReplicaConnection | None:
        """One that is there and without a request."""
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable and now - connection.idle_since < KEEP_S:
                return connection
            connection.close()
        return None

    async def take(self) -> ReplicaConnection:
        """A connection without a request. Raises ReplicaUnreachable."""
        if (kept := self.take_idle()) is not None:
            return kept
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                loop = asyncio.get_running_loop()
                _, made = await loop.create_unix_connection(lambda: ReplicaConnection(self._buffer), self._path)
        except OSError as error:  # TimeoutError is one
            raise ReplicaUnreachable(f"it cannot be reached: {error or type(error).__name__}") from None
        return made

    def post(self, connection: ReplicaConnection, path: str, body: bytes, headers: Mapping[str, str],
             begun: Begun | None = None) -> None:  # fmt: skip
        """Send a request, whose answer then is at the connection. `begun`: as that of `ReplicaConnection.send`."""
        more = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        head = f"POST {path} HTTP/1.1\r\n{self._head}{more}Content-Length: {len(body)}\r\n\r\n"
        num_lines = len(headers) + self._num_lines + 3
        if head.count("\n") != num_lines or head.count("\r") != num_lines:
            raise ValueError("a line break within a header of a request")
        connection.send(head.encode() + body, begun)

    async def ask(
        self,
        connection: ReplicaConnection,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        begun: Begun | None = None,
    ) -> ReplicaAnswer:
        """Post a body; returns as `ReplicaConnection.answer`. Raises BrokenAnswer."""
        self.post(connection, path, body, headers, begun)
        return await connection.answer()

    def give_back(self, connection: ReplicaConnection) -> None:
        """A request is over: keep the connection for another one, if its answer has been read to the end."""
        if connection.is_reusable and not self._is_closed:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """End those that are idle; the others end with their requests."""
        self._is_closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()
