"""Connections to a replica: what HTTP it may speak, what is kept, and what becomes of a request that is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_llmcloud.server.endpoints.replica_connection import (
    MAX_BUFFERED,
    MAX_HEAD,
    AnswerDecoder,
    BrokenAnswer,
    ReplicaConnections,
    ReplicaUnreachable,
)

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Name:  a: b \r\n\r\n"
WHOLE = (
    (CHUNKED + b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n", b"abc0123456789", True),
    (CHUNKED + b"1\r\na\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n", b"a", True),
    (CHUNKED + b"0\r\n\r\n", b"", True),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", True),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", True),
    (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", b"", True),
    (b"HTTP/1.1 204 Nothing\r\n\r\n", b"", True),
    (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
)
WRONG = (
    b"SSH-2.0-OpenSSH\r\n\r\n",
    b"HTTP/2 200\r\n\r\n",
    b"HTTP/1.1 abc\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    CHUNKED + b"-1\r\n",
    CHUNKED + b"0x3\r\nabc\r\n",
    CHUNKED + b"\r\n",
    CHUNKED + b"1\r\nab\r\n",
    CHUNKED + b"0\r\n\r\nmore",
    CHUNKED + b"1" * 2000,
    b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD,
)


@settings(max_examples=150)
@given(case=st.sampled_from(WHOLE), cuts=st.lists(st.integers(0, 200), max_size=12))
def test_however_the_bytes_come_the_answer_is_the_same(case: tuple[bytes, bytes, bool], cuts: list[int]) -> None:
    sent, body, keeps = case
    decoder, taken = AnswerDecoder(), []
    places = sorted({min(cut, len(sent)) for cut in cuts})
    for begin, end in zip([0, *places], [*places, len(sent)], strict=True):
        assert not decoder.is_complete or begin == len(sent)
        decoder.feed(sent[begin:end]) if end > begin else None
        taken.append(decoder.take())
    assert (b"".join(taken), decoder.is_complete, decoder.keeps) == (body, True, keeps)


def test_headers_are_found_by_their_names_in_lower_case() -> None:
    decoder = AnswerDecoder()
    decoder.feed(CHUNKED)
    assert decoder.headers["x-name"] == "a: b" and not decoder.is_complete


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    decoder = AnswerDecoder()
    decoder.feed(b"HTTP/1.1 200 OK\r\n\r\nall of it")
    assert not decoder.is_complete
    decoder.end()
    assert decoder.is_complete and decoder.take() == b"all of it"
    cut = AnswerDecoder()
    cut.feed(CHUNKED + b"5\r\nab")
    cut.end()
    assert not cut.is_complete


@pytest.mark.parametrize("sent", WRONG)
def test_what_is_no_answer_is_refused(sent: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        AnswerDecoder().feed(sent)


LARGE = b"x" * (MAX_BUFFERED + (1 << 16))


class Replica:
    """One that answers by the path that is asked."""

    def __init__(self) -> None:
        self.num_connections = 0
        self.peers: set[int] = set()
        self.was_cancelled = asyncio.Event()
        self.num_written = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer secret" and await request.read() == b"{}"
        assert request.transport is not None
        self.peers.add(id(request.transport))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            await self._write(request.path, response)
        except (asyncio.CancelledError, ConnectionError):
            self.was_cancelled.set()
            raise
        return response

    async def _write(self, path: str, response: web.StreamResponse) -> None:
        if path == "/die":
            await response.write(b"begun")
            assert response._req is not None and response._req.transport is not None
            response._req.transport.close()
            return
        if path == "/large":
            await response.write(LARGE)
            return
        if path == "/flood":
            while True:
                await response.write(b"x" * (1 << 16))
                self.num_written += 1
        await response.write(b"one ")
        if path == "/endless":
            await asyncio.Event().wait()
        await response.write(b"two")


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[Replica, ReplicaConnections]]:
    made = Replica()
    application = web.Application()
    application.router.add_post("/{name}", made.answer)
    runner = web.AppRunner(application, handler_cancellation=True)
    await runner.setup()
    path = str(folder / "r.sock")
    await web.UnixSite(runner, path).start()
    connections = ReplicaConnections(path, {"Authorization": "Bearer secret"})
    try:
        yield made, connections
    finally:
        connections.close()
        await runner.cleanup()


async def asked(connections: ReplicaConnections, path: str = "/whole") -> bytes:
    connection = await connections.take()
    try:
        answer = await connections.ask(connection, path, b"{}", {"X-Request-Id": "1"})
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        return await answer.read()
    finally:
        connections.give_back(connection)


async def test_one_connection_answers_request_after_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as (made, connections):
        for _ in range(5):
            assert await asked(connections) == b"one two"
        assert len(made.peers) == 1
        assert await asyncio.gather(*(asked(connections) for _ in range(3))) == [b"one two"] * 3


async def test_a_request_that_is_given_up_ends_at_the_replica_and_its_connection_is_not_used_again(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as (made, connections):
        connection = await connections.take()
        answer = await connections.ask(connection, "/endless", b"{}", {})
        assert await answer.readany() == b"one "
        connections.give_back(connection)
        async with asyncio.timeout(20):
            await made.was_cancelled.wait()
        assert await asked(connections) == b"one two"


async def test_a_replica_that_goes_within_its_answer_breaks_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, connections):
        with pytest.raises(BrokenAnswer, match="closed the connection"):
            await asked(connections, "/die")
        assert await asked(connections) == b"one two"


async def test_who_reads_slowly_has_the_replica_wait(tmp_path: Path) -> None:
    async with serving(tmp_path) as (made, connections):
        connection = await connections.take()
        answer = await connections.ask(connection, "/flood", b"{}", {})
        async with asyncio.timeout(20):
            while not connection.is_paused:
                await asyncio.sleep(0)
        assert made.num_written * (1 << 16) < MAX_BUFFERED + (8 << 20)  # what the kernel and the replica hold
        taken = 0
        while taken < 4 * MAX_BUFFERED:
            taken += len(await answer.readany())
        connections.give_back(connection)


async def test_a_connection_whose_large_answer_nobody_has_taken_answers_the_next_request(tmp_path: Path) -> None:
    """All of it has come, more than is held: whoever asked has hung up in that moment."""
    async with serving(tmp_path) as (made, connections):
        connection = await connections.take()
        await connections.ask(connection, "/large", b"{}", {})
        async with asyncio.timeout(20):
            while not connection.is_reusable:
                await asyncio.sleep(0)
        assert connection.is_paused
        connections.give_back(connection)
        async with asyncio.timeout(20):
            assert await asked(connections) == b"one two"
        assert len(made.peers) == 1


async def test_pieces_are_handed_over_as_they_come(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, connections):
        for path, end in (("/whole", True), ("/die", False)):
            connection, pieces = await connections.take(), []

            def take(piece: bytes, pieces: list[bytes] = pieces) -> bool:
                pieces.append(piece)
                return True

            answer = await connections.ask(connection, path, b"{}", {})
            if end:
                assert await answer.copy_to(take) and b"".join(pieces) == b"one two"
            else:
                with pytest.raises(BrokenAnswer, match="closed the connection"):
                    await answer.copy_to(take)
                assert pieces == [b"begun"]
            connections.give_back(connection)


async def test_who_can_take_no_more_is_handed_none_until_he_asks_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, connections):
        connection = await connections.take()
        pieces: list[bytes] = []

        def take(piece: bytes) -> bool:
            pieces.append(piece)
            return len(pieces) % 3 != 0

        answer = await connections.ask(connection, "/flood", b"{}", {})
        for number in range(1, 4):
            assert not await answer.copy_to(take) and len(pieces) == 3 * number
            async with asyncio.timeout(20):
                while not connection.is_paused:
                    await asyncio.sleep(0)
        connections.give_back(connection)


async def test_an_error_of_who_takes_the_pieces_is_raised_where_they_are_waited_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as (made, connections):

        def take(piece: bytes) -> bool:
            raise LookupError(piece)

        connection = await connections.take()
        answer = await connections.ask(connection, "/endless", b"{}", {})
        with pytest.raises(LookupError, match="one"):
            await answer.copy_to(take)
        connections.give_back(connection)
        async with asyncio.timeout(20):
            await made.was_cancelled.wait()


async def test_nobody_there_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ReplicaUnreachable, match="cannot be reached"):
        await ReplicaConnections(str(tmp_path / "none.sock"), {}).take()


async def test_a_header_cannot_hold_a_line_break(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, connections):
        connection = await connections.take()
        with pytest.raises(ValueError, match="line break"):
            await connections.ask(connection, "/whole", b"{}", {"X-Request-Id": "1\r\nX-More: 2"})
        connections.give_back(connection)
