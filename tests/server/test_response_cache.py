"""Answers from a cache: the same bytes, to who got them first, and never at the price of a request."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from traitlets.config import Config

from jupyter_llmcloud.server.answers import response_cache
from tests.support.server_parts import Server

pytest_plugins = ["tests.support.server_fixtures"]
SERVER = shutil.which("valkey-server") or shutil.which("redis-server")
pytestmark = pytest.mark.skipif(SERVER is None, reason="neither valkey-server nor redis-server is installed")


class Redis:
    """A real one, on a unix socket."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "r.sock"
        command = [SERVER, "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not self.socket.exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis(own_root: Path) -> Iterator[Redis]:
    folder = own_root.parent / "r"
    folder.mkdir()
    redis = Redis(folder)
    yield redis
    redis.end()


@pytest.fixture
def jp_server_config(jp_server_config: Config, redis: Redis) -> Config:
    jp_server_config.LLMCloudExtension.cache_url = redis.url
    return jp_server_config


async def num_asked(server: Server) -> int:
    return (await server.stats())["asked"]


async def test_the_same_request_of_the_same_key_is_answered_without_a_replica(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    first = await server.complete("hello", key, temperature=0)
    for _ in range(3):
        again = await server.complete("hello", key, temperature=0)
        assert again.content == first.content and again.headers["X-LLMCloud-Cache"] == "hit"
        assert again.headers["x-llmcloud-revision"] == first.headers["x-llmcloud-revision"] == "1"
    assert "X-LLMCloud-Cache" not in first.headers and await num_asked(server) == 1
    await server.complete("hello", await server.key(), temperature=0)  # another key
    await server.complete("hello", key, temperature=1)
    await server.complete("hello", key)
    assert await num_asked(server) == 4
    await server.context.requests.write()
    outcomes = [row["outcome"] for row in server.context.state.usage()]
    assert outcomes.count("cached") == 3 and outcomes.count("done") == 4


async def test_an_answer_that_is_given_again_is_kept_for_feedback_as_any_other(server: Server, model: Path) -> None:
    await server.serve(model, keep_requests=True)
    key = await server.key()
    _, again = [await server.complete("hello", key, temperature=0) for _ in range(2)]
    assert again.headers["X-LLMCloud-Cache"] == "hit"
    said = {"request_id": again.headers["X-Request-Id"], "rating": "up"}
    assert (await server.ask("POST", "llmcloud/v1/feedback", said, key)).status_code == 200
    rows = (await server.ask("GET", "llmcloud/api/endpoints/tiny/feedback/dataset")).text.splitlines()
    assert [json.loads(row)["completion"] for row in rows] == ["hello!"]


async def test_a_stream_is_given_again_as_a_stream(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    first, again = [await server.complete("count 5", key, temperature=0, stream=True) for _ in range(2)]
    assert first.content == again.content and again.content.endswith(b"data: [DONE]\n\n")
    assert again.headers["Content-Type"].startswith("text/event-stream") and await num_asked(server) == 1


async def test_what_fails_or_breaks_off_is_not_kept(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    for _ in range(2):
        assert (await server.complete("busy", key, temperature=0)).status_code == 503
        broken = await server.complete("end after 3", key, temperature=0, stream=True)
        assert b"error" in broken.content
    assert await num_asked(server) == 4


async def test_a_cache_that_hangs_or_dies_fails_no_request(server: Server, model: Path, redis: Redis) -> None:
    import signal

    await server.serve(model)
    key = await server.key()
    await server.complete("hello", key, temperature=0)
    redis.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    answers = [await server.complete("hello", key, temperature=0) for _ in range(6)]
    assert all(answer.json()["choices"][0]["text"] == "hello!" for answer in answers)
    waited = time.monotonic() - began
    # Three times it was waited for, then it was left alone.
    assert waited < 3 * 2 * response_cache.TIMEOUT_S + 2
    redis.process.send_signal(signal.SIGCONT)
    redis.end()
    assert (await server.complete("hello", key, temperature=0)).status_code == 200


async def test_another_url_or_no_library_leaves_the_server_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging
    import sys

    cache = response_cache.ResponseCache("http://nowhere", 1.0, logging.getLogger())
    assert not cache.is_on and await cache.get("key") is None
    monkeypatch.setitem(sys.modules, "redis", None)
    assert not response_cache.ResponseCache("redis://localhost", 1.0, logging.getLogger()).is_on
    await asyncio.gather(cache.close())
