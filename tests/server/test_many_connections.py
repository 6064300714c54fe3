"""Thousands of connections on which nothing is said, and 200 streams: the server answers others as if they were not there."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest

from tests.bench.gateway import stream, streams_beside
from tests.support.gateway_process import gateway_process

NUM_ACTIVE = 200
SPARE_FILES = 1_000
SOME = 10  # files and connections of the server's own, which come and go
ROUND_S = (
    0.05  # of the event loop, in processor time: a request waits for the one that goes on, and is done in the next
)
IDLE_BYTES = 50_000
GONE_S = 30.0


@pytest.fixture
def many_files() -> Iterator[int]:
    """As many open files as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    "num_idle", [pytest.param(2_000, marks=pytest.mark.story), pytest.param(10_000, marks=pytest.mark.soak)]
)
async def test_idle_connections_and_200_streams_leave_the_server_quick_and_are_forgotten(
    own_root: Path, many_files: int, num_idle: int
) -> None:
    num_idle = min(num_idle, many_files - SPARE_FILES)
    with gateway_process(own_root.parent / "g", keep_rounds=True) as server:
        process, base = psutil.Process(server.pid), urlsplit(server.url)
        gateway = {"Authorization": f"Bearer {server.key}"}
        url = f"{server.url}llmcloud/v1/completions"
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=gateway) as client,
            aiohttp.ClientSession(headers=server.as_user) as other,
        ):
            await stream(client, url, 1)
            before, memory = process.num_fds(), process.memory_info().rss
            writers: list[asyncio.StreamWriter] = []
            while len(writers) < num_idle:
                opened = (asyncio.open_connection(base.hostname, base.port) for _ in range(100))
                writers += [writer for _, writer in await asyncio.gather(*opened)]
            for writer in writers[::2]:
                writer.write(b"GET /llmcloud/v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")  # and no more
            deadline = time.monotonic() + GONE_S
            while process.num_fds() < before + num_idle - SOME and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
            assert process.num_fds() >= before + num_idle - SOME
            assert (process.memory_info().rss - memory) / num_idle < IDLE_BYTES
            num_rounds, num_asked = len(server.round_seconds()), 0
            async with streams_beside(server, NUM_ACTIVE, 40, 200) as streams:
                while streams.returncode is None:
                    async with other.get(f"{server.url}llmcloud/api/status") as answer:
                        assert answer.status == 200
                    num_asked += 1
                    await asyncio.sleep(0.02)
            rounds = server.round_seconds()[num_rounds:]
            for writer in writers:
                writer.close()
            for writer in writers:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        deadline = time.monotonic() + GONE_S
        kept = before + NUM_ACTIVE + SOME  # those to the replica are kept for the next requests, for a minute
        while process.num_fds() > kept and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert process.num_fds() <= kept, "connections that nobody has any more are kept"
    assert num_asked > 10
    assert quantiles(rounds, n=100)[98] < ROUND_S and max(rounds) < 10 * ROUND_S
