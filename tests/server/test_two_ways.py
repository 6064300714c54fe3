"""The way without a handler and that of a handler: the same request gets the same answer, log, metrics and row."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from prometheus_client import REGISTRY

from jupyter_llmcloud.server.gateway.handlers import InferenceHandler
from jupyter_llmcloud.server.gateway.key_alerts import KeyMonitor
from jupyter_llmcloud.server.gateway.keyed.router import KEYED, KeyedRouter
from tests.support.server_parts import Server, until

pytest_plugins = ["tests.support.server_fixtures"]

_OF_ONE_REQUEST = re.compile(
    r"req-[0-9a-f]{32}|\b[0-9.]+ ?ms\b|\d{4}-\d\d-\d\dT[\d:.]+Z|[0-9a-f]{32}(?:-[0-9a-f]{16})?|\b\d+(\.\d+)? s\b"
    r"|replica [\w-]+|tiny-\w+"
)
_NOT_COMPARED = {"date", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"}
_METRICS = ("http_request_duration_seconds_count", "llmcloud_requests_total", "llmcloud_errors_total",
            "llmcloud_first_byte_seconds_count", "llmcloud_time_to_first_token_seconds_count",
            "llmcloud_queue_wait_seconds_count")  # fmt: skip
_ROW = ("actor", "endpoint", "route", "status", "outcome", "prompt_tokens", "completion_tokens")


def plain(text: str) -> str:
    """A text without what belongs to one request alone."""
    return _OF_ONE_REQUEST.sub("...", text)


class Seen(NamedTuple):
    """What of a request can be seen afterwards, by anybody."""

    status: int
    headers: dict[str, str]
    body: str
    logged: list[str]
    counted: Counter[Any]
    row: dict[str, Any]
    activity: bool


class Lines(logging.Handler):
    """What the server logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {plain(record.getMessage())}")


class TwoWays:
    """Sends a request once by a handler, once without."""

    def __init__(self, server: Server, application: Any, handled: list[str], lines: Lines) -> None:
        self.server = server
        self.router: KeyedRouter = application.settings[KEYED]
        self.handled = handled
        self.lines = lines

    async def see(self, ask: Callable[[], Awaitable[Any]], times: int = 3) -> list[Seen]:
        """What was seen of it, by each way; the third time its connection is read without tornado."""
        self.router._hosts.clear()
        self.handled.clear()
        handled = await self._see(ask)
        assert len(self.handled) == 1
        return [handled, *[await self._see(ask) for _ in range(times - 1)]]

    async def _see(self, ask: Callable[[], Awaitable[Any]]) -> Seen:
        await until(lambda: _lives(self.server), "a replica is there")
        settings = self.router.services.settings
        settings["last_activity_times"].pop("llmcloud", None)
        before, self.lines.lines = _counts(), []
        answer = await ask()
        await self.server.context.requests.write()
        row = self.server.context.state.request(answer.headers["x-request-id"]) or {}
        return Seen(
            answer.status_code,
            {name: plain(told) for name, told in answer.headers.items() if name not in _NOT_COMPARED},
            plain(answer.text),
            list(self.lines.lines),
            _counts() - before,
            {name: row.get(name) for name in _ROW},
            "llmcloud" in settings["last_activity_times"],
        )


def _counts() -> Counter[Any]:
    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples if sample.name in _METRICS)
    return Counter({(one.name, *sorted(one.labels.items())): int(one.value) for one in samples})


@pytest.fixture
def two_ways(server: Server, jp_web_app: Any, jp_serverapp: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoWays]:
    """A server whose requests can be sent by either way."""
    handled: list[str] = []
    prepare = InferenceHandler.prepare

    async def noted(self: Any) -> None:
        handled.append(self.request.path)
        await prepare(self)

    monkeypatch.setattr(InferenceHandler, "prepare", noted)
    lines = Lines()
    jp_serverapp.log.addHandler(lines)
    yield TwoWays(server, jp_web_app, handled, lines)
    jp_serverapp.log.removeHandler(lines)


ASKED = {
    "whole": ("completions", {"prompt": "hello"}),
    "stream": ("completions", {"prompt": "count 3", "stream": True}),
    "chat": ("chat/completions", {"messages": [{"role": "user", "content": "count 2"}], "stream": True}),
    "embeddings": ("embeddings", {"input": "echo"}),
    "other letters": ("completions", {"prompt": "\u5317\u4eac \U0001f642 <b>"}),
    "what the replica is told": ("completions", {"prompt": "headers"}),
    "busy": ("completions", {"prompt": "busy"}),
    "unknown to the replica": ("tokenize", {"prompt": "x"}),
    "replica lost": ("completions", {"prompt": "die"}),
    "replica lost in a stream": ("completions", {"prompt": "die after 2", "stream": True}),
    "a stream that ends early": ("completions", {"prompt": "end after 2", "stream": True}),
}


@pytest.mark.parametrize("name", ASKED)
async def test_an_answer_is_the_same_with_and_without_a_handler(two_ways: TwoWays, model: Path, name: str) -> None:
    route, body = ASKED[name]
    await two_ways.server.serve(model)
    key = await two_ways.server.key("infer:tiny", requests_per_minute=100)
    headers = {"User-Agent": "a client", "Referer": "https://example.org/page"}

    async def ask() -> Any:
        return await two_ways.server.ask(
            "POST", f"llmcloud/v1/{route}", {"model": "tiny", **body}, key, headers=headers
        )

    # Replicas that are lost again and again are started later and later.
    handled, *others = await two_ways.see(ask, 2 if name == "replica lost" else 3)
    assert len(two_ways.handled) == 1, "the second request took a handler"
    for keyed in others:
        for field, by_handler, by_key in zip(Seen._fields, handled, keyed, strict=True):
            assert by_handler == by_key, (name, field)
    assert keyed.activity and keyed.row["status"] == keyed.status
    assert [one for one in keyed.counted if one[0].startswith("http_request")], keyed.counted
    assert bool(keyed.logged) == (keyed.status >= 400), keyed.logged


async def test_headers_that_are_configured_while_the_server_runs_are_in_the_next_answer(
    two_ways: TwoWays, model: Path, jp_web_app: Any
) -> None:
    server = two_ways.server
    await server.serve(model)
    key = await server.key()
    for _ in range(2):
        assert "x-of-the-house" not in (await server.complete("hello", key)).headers
    jp_web_app.settings.setdefault("headers", {})["X-Of-The-House"] = "1"
    two_ways.handled.clear()
    assert [(await server.complete("hello", key)).headers["x-of-the-house"] for _ in range(3)] == ["1"] * 3
    assert len(two_ways.handled) == 1
    del jp_web_app.settings["headers"]["X-Of-The-House"]
    assert "x-of-the-house" not in (await server.complete("hello", key)).headers


async def test_a_host_that_is_not_allowed_any_more_is_refused(two_ways: TwoWays, model: Path, jp_web_app: Any) -> None:
    server = two_ways.server
    await server.serve(model)
    key, host = await server.key(), {"Host": "notebooks.example.org"}
    jp_web_app.settings["allow_remote_access"] = True

    async def ask() -> int:
        body = {"model": "tiny", "prompt": "hello"}
        return (await server.ask("POST", "llmcloud/v1/completions", body, key, headers=host)).status_code

    assert [await ask() for _ in range(2)] == [200, 200]
    jp_web_app.settings["allow_remote_access"] = False
    assert await ask() == 403


async def test_the_address_is_that_of_the_client_behind_a_proxy_that_is_trusted(
    two_ways: TwoWays, model: Path, http_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = two_ways.server
    await server.serve(model)
    key, seen = await server.key(), []
    monkeypatch.setattr(KeyMonitor, "asked", lambda self, key_id, address: seen.append(address))
    headers = {"X-Forwarded-For": "203.0.113.7", "X-Scheme": "https"}

    async def ask() -> Any:
        body = {"model": "tiny", "prompt": "hello"}
        return await server.ask("POST", "llmcloud/v1/completions", body, key, headers=headers)

    for trusted, address in ((False, "127.0.0.1"), (True, "203.0.113.7")):
        http_server.xheaders = trusted
        await server.client.aclose()
        server.client = type(server.client)(trust_env=False)
        seen.clear()
        await two_ways.see(ask)
        assert seen == [address] * 3


ENDS = {
    "whole": ({"prompt": "hello"}, 200),
    "stream": ({"prompt": "count 2", "stream": True}, 200),
    "busy": ({"prompt": "busy"}, 503),
    "replica lost": ({"prompt": "die"}, 503),
    "replica lost in a stream": ({"prompt": "die after 1", "stream": True}, 200),
    "refused": ({"prompt": "x", "stream": "yes"}, 400),
}


async def test_however_a_request_ends_another_one_may_be_made_at_once(two_ways: TwoWays, model: Path) -> None:
    server = two_ways.server
    await server.serve(model)
    key = await server.key("infer:tiny", parallel_requests=1)
    assert (await server.complete("hello", key)).status_code == 200
    for name, (body, status) in ENDS.items():
        await until(lambda: _lives(server), "a replica is there")
        answer = await server.ask("POST", "llmcloud/v1/completions", {"model": "tiny", **body}, key)
        assert answer.status_code == status, (name, answer.text)
    await until(lambda: _lives(server), "a replica is there")
    for prompt in ("wait", "endless"):  # hung up before the first piece, and between two
        asking = asyncio.ensure_future(server.complete(prompt, key, stream=True))
        await until(lambda: _num_active(server, 1), "the replica answers")
        assert (await server.complete("hello", key)).status_code == 429
        asking.cancel()
        await until(lambda: _num_active(server, 0), "the replica stops")
        assert (await server.complete("hello", key)).status_code == 200


async def test_a_request_that_fails_before_it_is_let_in_gives_back_what_was_reserved(
    two_ways: TwoWays, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = two_ways.server
    await server.serve(model)
    key = await server.key("infer:tiny", parallel_requests=1, tokens_per_minute=300)
    assert (await server.complete("hello", key)).status_code == 200
    endpoint = server.context.endpoints.get("tiny")
    with monkeypatch.context() as patch:
        patch.setattr(endpoint, "copy_to_shadow", lambda *_: 1 / 0)
        two_ways.handled.clear()
        assert [(await server.complete("hello", key)).status_code for _ in range(3)] == [500] * 3
        assert not two_ways.handled
    assert (await server.complete("hello", key)).status_code == 200
    assert [line for line in two_ways.lines.lines if line.startswith("ERROR 500 POST")]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_key_that_is_revoked_while_its_answer_is_made_ends_it_by_either_way(
    two_ways: TwoWays, model: Path, stream: bool
) -> None:
    server = two_ways.server
    await server.serve(model)
    keys = [await server.key() for _ in range(2)]
    two_ways.router._hosts.clear()
    told = []
    for key in keys:
        asking = asyncio.ensure_future(server.complete("endless" if stream else "wait", key, stream=stream))
        await until(lambda: _num_active(server, 1), "the replica answers")
        await server.ask("DELETE", f"llmcloud/api/keys/{key.split('-')[2]}")
        answer = await asking
        last = plain(re.sub(r'data: \{"choices.*?\n\n', "", answer.text))
        headers = {name: plain(value) for name, value in answer.headers.items() if name not in _NOT_COMPARED}
        told.append((answer.status_code, headers, last))
        await until(lambda: _num_active(server, 0), "the replica stops")
    assert told[0] == told[1]
    assert told[0][0] == (200 if stream else 401) and "invalid_api_key" in told[0][2]
    assert len([path for path in two_ways.handled if path.endswith("completions")]) == 1


async def _lives(server: Server) -> bool:
    """Whether the replica that is thought to be ready is not one that has just ended."""
    replicas = server.context.endpoints.get("tiny").ready_replicas()
    try:
        return bool(replicas) and (await server.stats())["active"] == 0
    except aiohttp.ClientError:
        return False


async def _num_active(server: Server, number: int) -> bool:
    return (await server.stats())["active"] == number
