"""A connection with plain requests of a key is read without tornado, and nobody can tell the difference."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tornado.httputil import HTTPHeaders, HTTPInputError

from jupyter_llmcloud.server.endpoints.replica_connection import ReplicaConnection
from jupyter_llmcloud.server.gateway.keyed import answer as keyed_answer
from jupyter_llmcloud.server.gateway.keyed import known_keys, plain_connection, request_reader
from jupyter_llmcloud.server.gateway.keyed.plain_connection import PlainConnection
from jupyter_llmcloud.server.gateway.keyed.plain_head import plain_head
from jupyter_llmcloud.server.gateway.keyed.router import KEYED
from jupyter_llmcloud.storage.server_state import ServerState
from tests.support.server_parts import Server, until

pytest_plugins = ["tests.support.server_fixtures"]

DEADLINE_S = 20


class RawClient:
    """One connection to the server, and what is read on it."""

    def __init__(self, server: Server, reader: Any, writer: Any, connections: Any) -> None:
        self.base = urlsplit(server.url)
        self.reader = reader
        self.writer = writer
        self._connections = connections

    @property
    def num_plain(self) -> int:
        """How many connections of the server are read without tornado."""
        return len(self._connections._taken)

    @property
    def num_unsent(self) -> int:
        """Bytes that the server holds since their client does not read."""
        transports = [one._transport for one in self._connections._taken]
        return sum(transport.get_write_buffer_size() for transport in transports if transport is not None)

    @property
    def num_unread(self) -> int:
        """Bytes of requests that the server holds."""
        return sum(one._reader.num_unread for one in self._connections._taken)

    def request(self, body: bytes, key: str, route: str = "completions", *more: str) -> bytes:
        lines = [f"POST {self.base.path}/llmcloud/v1/{route} HTTP/1.1", f"Host: {self.base.netloc}", *more]
        lines += [f"Authorization: Bearer {key}", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next one."""
        async with asyncio.timeout(DEADLINE_S):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in lines if line}
            body = b""
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readline(), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readline()
            else:
                body = await self.reader.readexactly(int(headers["content-length"]))
        return int(first.split()[1]), headers, body

    async def ask(self, body: bytes, key: str, *more: str) -> tuple[int, dict[str, str], bytes]:
        self.writer.write(self.request(body, key, "completions", *more))
        return await self.answer()


def asked(prompt: str, **more: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": prompt, **more}).encode()


@asynccontextmanager
async def raw_client(server: Server, application: Any) -> AsyncIterator[RawClient]:
    base = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(base.hostname, base.port)
    yield RawClient(server, reader, writer, application.settings[KEYED]._connections)
    writer.close()


@asynccontextmanager
async def plain_client(server: Server, application: Any, key: str) -> AsyncIterator[RawClient]:
    """One whose connection is read without tornado."""
    async with raw_client(server, application) as client:
        for _ in range(3):
            assert (await client.ask(asked("hello"), key))[0] == 200
        assert client.num_plain == 1
        yield client


async def test_the_third_request_of_a_connection_is_read_without_tornado_and_answered_alike(
    server: Server, model: Path, jp_web_app: Any
) -> None:
    await server.serve(model)
    key = await server.key("infer:tiny", requests_per_minute=100)
    of_one = {"date", "x-request-id", "x-ratelimit-reset-requests", "x-ratelimit-remaining-requests"}
    async with raw_client(server, jp_web_app) as client:
        for body in (asked("hello"), asked("count 3", stream=True), asked("busy"), asked("x" * 100_000)):
            told = [await client.ask(body, key) for _ in range(3)]
            shown = [
                (status, {n: v for n, v in headers.items() if n not in of_one}, text) for status, headers, text in told
            ]
            assert shown[0] == shown[1] == shown[2]
            assert set(told[2][1]) >= of_one and client.num_plain == 1
    await until(lambda: client.num_plain == 0, "it is forgotten")
    await server.context.requests.write()
    assert server.context.state.request(told[2][1]["x-request-id"])["actor"] == f"key:{key.split('-')[2]}"


async def test_a_replica_is_asked_in_the_moment_in_which_a_request_has_come(
    server: Server, model: Path, jp_web_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked by a task, which begins in the next round of the loop."""
    await server.serve(model)
    key, seen = await server.key(), []
    updated, sent = PlainConnection.buffer_updated, ReplicaConnection.send

    def reading(self: PlainConnection, nbytes: int) -> None:
        seen.append("read")
        updated(self, nbytes)
        seen.append("done")

    def sending(self: ReplicaConnection, *args: Any) -> None:
        seen.append("asked")
        sent(self, *args)

    monkeypatch.setattr(PlainConnection, "buffer_updated", reading)
    monkeypatch.setattr(ReplicaConnection, "send", sending)
    async with plain_client(server, jp_web_app, key) as client:
        for body in (asked("hello"), asked("count 2", stream=True)):
            seen.clear()
            assert (await client.ask(body, key))[0] == 200
            assert seen == ["read", "asked", "done"]


async def test_a_head_is_read_once_while_it_and_the_row_of_its_key_stay_as_they_are(
    server: Server, model: Path, jp_web_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usage is written to the file in which keys are, and each time all of the head was read anew."""
    await server.serve(model)
    key, heads = await server.key(), []
    monkeypatch.setattr(request_reader, "plain_head", lambda head: heads.append(head) or plain_head(head))
    async with plain_client(server, jp_web_app, key) as client:
        for number in range(3):
            await server.context.requests.write()
            assert (await client.ask(asked("x" * number + "hello"), key))[0] == 200
        assert len(heads) == 1
        server.context.state.revoke_key(key.split("-")[2], 1.0)
        assert (await client.ask(asked("hello"), key))[0] == 401
        assert len(heads) == 2


async def test_no_request_waits_for_its_key_to_be_read_as_long_as_only_usage_is_written(
    server: Server, model: Path, jp_web_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_keys, "MAX_AGE_S", 60.0)
    monkeypatch.setattr(known_keys, "IN_USE_S", 60.0)
    await server.serve(model)
    key, read = await server.key(), []
    read_key, state = ServerState.key, server.context.state
    monkeypatch.setattr(ServerState, "key", lambda self, key_id: read.append(key_id) or read_key(self, key_id))
    async with plain_client(server, jp_web_app, key) as client:
        for _ in range(3):
            await server.context.requests.write()
            read.clear()
            assert (await client.ask(asked("hello"), key))[0] == 200
            assert read == []
        state.revoke_key(key.split("-")[2], 1.0)
        assert (await client.ask(asked("hello"), key))[0] == 401


async def test_a_request_that_comes_while_the_server_ends_is_told_so_and_no_replica_is_asked(
    server: Server, model: Path, jp_web_app: Any
) -> None:
    await server.serve(model)
    key = await server.key()
    async with plain_client(server, jp_web_app, key) as client:
        before = (await server.stats())["asked"]
        server.context.requests._closing = True
        for _ in range(3):
            status, _, body = await client.ask(asked("wait"), key)
            assert status == 503 and b"server_restarting" in body
        server.context.requests._closing = False
        assert (await client.ask(asked("hello"), key))[0] == 200
        assert (await server.stats())["asked"] == before + 1
        endpoint = server.context.endpoints.get("tiny")
        assert [one.num_in_flight for one in endpoint.ready_replicas()] == [0]


NOT_PLAIN = {
    "no such model": (asked("hello", model="none"), (), 403),
    "no JSON": (b"{", (), 400),
    "a wrong type": (asked("hello", stream="yes"), (), 400),
    "empty": (b"", (), 400),
    "compressed": (asked("hello"), ("Content-Encoding: br",), 415),
    "of a page": (asked("hello"), ("Origin: https://example.org",), 200),
    "for another host": (asked("hello"), ("X-A: b", "Host: example.org"), 400),
    "a header that goes on": (asked("hello"), ("X-A: b", " c"), 400),
    "a header without a name": (asked("hello"), (": b",), 400),
    "two lengths": (asked("hello"), ("Content-Length: 3",), 400),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
async def test_what_is_not_plain_or_is_refused_is_answered_as_on_a_connection_of_tornado(
    server: Server, model: Path, jp_web_app: Any, name: str
) -> None:
    body, more, status = NOT_PLAIN[name]
    await server.serve(model)
    key, seen = await server.key(), []
    for opened in (raw_client(server, jp_web_app), plain_client(server, jp_web_app, key)):
        async with opened as client:
            client.writer.write(client.request(body, key, "completions", *more))
            first = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
            seen.append(int(first.split()[1]))
            assert client.num_plain == 0
    assert seen[0] == seen[1] and (seen[0] == status or name == "for another host"), seen


async def test_whatever_else_is_asked_on_it_is_answered_too(server: Server, model: Path, jp_web_app: Any) -> None:
    await server.serve(model)
    key = await server.key()
    async with plain_client(server, jp_web_app, key) as client:
        path, host = client.base.path, client.base.netloc
        for _ in range(2):
            client.writer.write(
                f"GET {path}/llmcloud/v1/models HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
            )
            status, _, body = await client.answer()
            assert status == 200 and b"tiny" in body and client.num_plain == 0
            assert (await client.ask(asked("hello"), key))[0] == 200


async def test_requests_that_come_at_once_or_piece_by_piece_are_answered_in_turn(
    server: Server, model: Path, jp_web_app: Any
) -> None:
    await server.serve(model)
    key = await server.key()
    async with plain_client(server, jp_web_app, key) as client:
        client.writer.write(b"".join(client.request(asked(f"text {n}"), key) for n in range(5)))
        for number in range(5):
            assert f"text {number}!".encode() in (await client.answer())[2]
        assert client.num_plain == 1
        head, _, body = client.request(asked("y" * 300), key).partition(b"\r\n\r\n")
        client.writer.write(head + b"\r\n\r\n")
        for at in range(0, len(body), 50):  # httpx sends its body after the head
            client.writer.write(body[at : at + 50])
            await asyncio.sleep(0.01)
        assert b"y" * 300 in (await client.answer())[2] and client.num_plain == 1
        get = f"GET {client.base.path}/llmcloud/v1/models HTTP/1.1\r\nHost: {client.base.netloc}\r\n"
        get += f"Authorization: Bearer {key}\r\n\r\n"
        streamed = client.request(asked("count 3", stream=True), key)
        client.writer.write(streamed + get.encode() + streamed)
        assert [(await client.answer())[0] for _ in range(3)] == [200] * 3 and client.num_plain == 0
    async with plain_client(server, jp_web_app, key) as client:
        for piece in (streamed[:30], streamed[30:]):  # the head itself in two
            client.writer.write(piece)
            await asyncio.sleep(0.05)
        assert (await client.answer())[2].endswith(b"data: [DONE]\n\n")


async def test_a_key_that_is_revoked_is_refused_on_it(server: Server, model: Path, jp_web_app: Any) -> None:
    await server.serve(model)
    key = await server.key()
    async with plain_client(server, jp_web_app, key) as client:
        client.writer.write(client.request(asked("endless", stream=True), key))
        await client.reader.readuntil(b"data: ")
        await server.ask("DELETE", f"llmcloud/api/keys/{key.split('-')[2]}")
        rest = await asyncio.wait_for(client.reader.readuntil(b"\r\n0\r\n\r\n"), DEADLINE_S)
        assert b"invalid_api_key" in rest and b"[DONE]" not in rest
        assert (await client.ask(asked("hello"), key))[0] == 401


@pytest.mark.parametrize("prompt", ["wait", "endless"])
async def test_who_hangs_up_is_noticed_on_it(server: Server, model: Path, jp_web_app: Any, prompt: str) -> None:
    await server.serve(model)
    key = await server.key()

    async def num_active(number: int) -> bool:
        return (await server.stats())["active"] == number

    async with plain_client(server, jp_web_app, key) as client:
        client.writer.write(client.request(asked(prompt, stream=True), key))
        await until(lambda: num_active(1), "the replica answers")
        client.writer.close()
        await until(lambda: num_active(0), "the replica stops")
        await until(lambda: client.num_plain == 0, "it is forgotten")


async def test_a_client_that_reads_slowly_gets_all_of_it_and_one_that_does_not_read_is_cut(
    server: Server, model: Path, jp_web_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.serve(model)
    key = await server.key()
    async with plain_client(server, jp_web_app, key) as client:
        client.writer.write(client.request(asked("flood 3000", stream=True), key))
        await until(lambda: client.num_unsent > 0, "the system takes no more")
        status, _, body = await client.answer()
        assert status == 200 and body.count(b"x" * 4000) == 3000 and body.endswith(b"data: [DONE]\n\n")
        assert (await client.ask(asked("hello"), key))[0] == 200
        monkeypatch.setattr(keyed_answer, "SLOW_READER_S", 0.3)
        client.writer.write(client.request(asked("flood 100000", stream=True), key))
        await until(lambda: client.num_plain == 0, "it is cut")


async def test_who_asks_on_and_on_and_does_not_read_waits_for_its_turn(
    server: Server, model: Path, jp_web_app: Any
) -> None:
    """Answers, and whatever came behind them, were kept in memory, as much as a client with a key liked to send."""
    await server.serve(model)
    key = await server.key()
    large, number = asked("y" * 300_000), 100
    async with plain_client(server, jp_web_app, key) as client, raw_client(server, jp_web_app) as other:
        client.writer.write(client.request(large, key) * number)
        await until(lambda: client.num_unsent > 0, "the system takes no more")
        for _ in range(30):  # in which all of these could be answered
            assert (await other.ask(asked("hello"), key))[0] == 200
        assert client.num_unsent < 2 * len(large)
        for _ in range(number):
            assert b"y" * 300_000 in (await client.answer())[2]
        lines = [
            f"GET {client.base.path}/llmcloud/livez HTTP/1.1",
            f"Host: {client.base.netloc}",
            f"X: {'x' * 9999}",
            "",
        ]
        not_plain = "\r\n".join([*lines, ""]).encode()
        client.writer.write(client.request(asked("flood 3000", stream=True), key) + not_plain * 500)
        await until(lambda: client.num_unsent > 0, "the system takes no more")
        for _ in range(30):
            assert (await other.ask(asked("hello"), key))[0] == 200
        assert client.num_unread < 1 << 18
        assert (await client.answer())[2].endswith(b"data: [DONE]\n\n")
        for _ in range(500):
            assert (await client.answer())[0] == 200


async def test_a_body_that_does_not_come_and_a_connection_that_is_idle_are_not_waited_for(
    server: Server, model: Path, jp_web_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_connection, "BODY_TIMEOUT_S", 0.3)
    await server.serve(model)
    key = await server.key()
    async with plain_client(server, jp_web_app, key) as client:
        client.writer.write(client.request(asked("hello"), key)[:-3])
        assert await asyncio.wait_for(client.reader.read(), DEADLINE_S) == b"" and client.num_plain == 0
    monkeypatch.setattr(plain_connection.ConnectionOrigin, "idle_s", 0.3)
    async with plain_client(server, jp_web_app, key) as client:
        assert await asyncio.wait_for(client.reader.read(), DEADLINE_S) == b"" and client.num_plain == 0


async def test_the_end_of_the_server_is_told_and_closes_it(server: Server, model: Path, jp_web_app: Any) -> None:
    await server.serve(model)
    key = await server.key()
    async with plain_client(server, jp_web_app, key) as client:
        client.writer.write(client.request(asked("endless", stream=True), key))
        await client.reader.readuntil(b"data: ")
        await server.context.requests.close()
        assert b"server_restarting" in await asyncio.wait_for(client.reader.readuntil(b"\r\n0\r\n\r\n"), DEADLINE_S)
        jp_web_app.settings[KEYED].close()
        assert await asyncio.wait_for(client.reader.read(), DEADLINE_S) == b""


HEADS = {
    "plain": "POST /a HTTP/1.1\r\nHost: h\r\nX-Y:  z \r\n",
    "tabs and signs": "POST /a?b=%20 HTTP/1.1\r\nhost:\th\r\nX_!#$%&'*+-.^`|~: a:b\t c\r\nEmpty:\r\n",
    "another method": "GET /a HTTP/1.1\r\nHost: h\r\n",
    "another version": "POST /a HTTP/1.0\r\nHost: h\r\n",
    "two spaces": "POST  /a HTTP/1.1\r\nHost: h\r\n",
    "a space before the colon": "POST /a HTTP/1.1\r\nHost : h\r\n",
    "a line that goes on": "POST /a HTTP/1.1\r\nHost: h\r\n i\r\n",
    "a line feed alone": "POST /a HTTP/1.1\r\nHost: h\nX: y\r\n",
    "a carriage return alone": "POST /a HTTP/1.1\r\nHost: h\rX: y\r\n",
    "a NUL": "POST /a HTTP/1.1\r\nHost: h\0\r\n",
    "no colon": "POST /a HTTP/1.1\r\nHost\r\n",
    "twice": "POST /a HTTP/1.1\r\nHost: h\r\nhost: i\r\n",
    "other letters": "POST /a HTTP/1.1\r\nHost: h\u00e9\r\n",
    "no headers": "POST /a HTTP/1.1\r\n",
    "an empty line before it": "\r\nPOST /a HTTP/1.1\r\nHost: h\r\n",
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_read_without_tornado_says_the_same_to_tornado(name: str) -> None:
    read = plain_head(HEADS[name].encode("latin-1"))
    assert (read is not None) is (name in ("plain", "tabs and signs"))
    if read is not None:
        first, _, lines = HEADS[name].partition("\r\n")
        assert first == f"POST {read.uri} HTTP/1.1"
        try:
            told = HTTPHeaders.parse(lines)
        except HTTPInputError as error:
            pytest.fail(f"tornado refuses it: {error}")
        assert {header.lower(): value for header, value in told.get_all()} == read.headers
