"""What the gateway costs: a replica asked directly, beside the same replica asked through a Jupyter server with a key.

The replica is a stand-in that streams pieces with the time at which each was sent, so that what lies between is the way.

One stream leaves the processors asleep most of the time, and each of the four processes that a piece passes has to wake
one up. In a virtual machine that is most of the time added, and says more of its host than of us. So it is measured
while processes that only get what nobody else wants (SCHED_IDLE) keep them awake, and once more without these.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil

from tests.bench.measured import Row
from tests.bench.refusals import gateway_refusals, replica_refusals
from tests.bench.shell import REPOSITORY
from tests.support.gateway_process import GatewayProcess, gateway_process

ROUNDS = 40
NUM_PIECES = 20
GAP_MS = 5
NUM_STREAMS = 16
STATUS_S = 10.0
MANY_STREAMS = 200
BEGIN_S = 60.0  # until they all have begun
FIRST_MS, PIECE_MS, PIECE_CPU_MS, STATUS_MS = 1.0, 0.3, 0.3, 100.0  # the goals
SHARE = 0.95
_SPIN = "import os\nos.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile os.getppid() > 1: pass"
TOKEN_MS = 20.0  # between the tokens of a stream where 16 of them make 800 a second


Ask = tuple[aiohttp.ClientSession, str]


@dataclass
class Seen:
    """One stream: seconds to its first piece, and how long each further one was on its way."""

    first_s: float = 0.0
    ways_s: list[float] = field(default_factory=list)


def measure(folder: Path) -> list[Row]:
    """The rows of this axis."""
    with gateway_process(folder / "server") as server:
        rows = asyncio.run(_measure(server))
    with gateway_process(folder / "watched", keep_rounds=True) as server:
        rows.append(asyncio.run(_rounds_during_streams(server)))
    return [*rows, asyncio.run(replica_refusals(folder))]


async def _measure(server: GatewayProcess) -> list[Row]:
    connector = aiohttp.UnixConnector(server.replica_socket, limit=0)
    direct_headers = {"Authorization": f"Bearer {server.replica_token}"}
    headers = {"Authorization": f"Bearer {server.key}"}
    async with (
        aiohttp.ClientSession(connector=connector, headers=direct_headers) as replica,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as gateway,
    ):
        ask_replica = (replica, "http://replica/v1/completions")
        ask_gateway = (gateway, f"{server.url}llmcloud/v1/completions")
        for session, url in (ask_replica, ask_gateway):
            await stream(session, url)  # connected, and warm
        with awake():
            first, piece = await _added(ask_replica, ask_gateway)
        asleep, _ = await _added(ask_replica, ask_gateway)
        shares = [await _pieces_per_s(*ask_gateway) / await _pieces_per_s(*ask_replica) for _ in range(3)]
        costs = [await _cpu_per_piece(server, ask_gateway) for _ in range(3)]
        status = await _status_during_streams(server)
        refusals = await gateway_refusals(server)
    return [
        Row("gateway", "added to the first piece of a stream, p50", "ms", "", first, limit=FIRST_MS),
        Row("gateway", "  the same where processors fall asleep in between", "ms", "", asleep),
        Row("gateway", "added to each further piece, p50", "ms", "", piece, limit=PIECE_MS),
        Row("gateway", f"pieces/s of {NUM_STREAMS} streams, of those without it", "share", "", shares, limit=SHARE,
            at_least=True),
        Row("gateway", f"CPU time a piece, {NUM_STREAMS} streams", "ms", "", costs, limit=PIECE_CPU_MS),
        Row(
            "gateway", f"/api/status during {MANY_STREAMS} streams, p99", "ms", "", status, limit=STATUS_MS, percent=99
        ),
        refusals,
    ]  # fmt: skip


@contextmanager
def awake() -> Iterator[None]:
    """No processor sleeps within the block; whoever wants one gets it at once."""
    spinning = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


async def _added(ask_replica: Ask, ask_gateway: Ask) -> tuple[list[float], list[float]]:
    """Milliseconds that the gateway adds to the first and to each further piece, in each of some rounds."""
    first, further = [], []
    for _ in range(ROUNDS):
        theirs, ours = await stream(*ask_replica), await stream(*ask_gateway)
        first.append((ours.first_s - theirs.first_s) * 1e3)
        further.append((median(ours.ways_s) - median(theirs.ways_s)) * 1e3)
    return first, further


async def stream(
    session: aiohttp.ClientSession, url: str, num_pieces: int = NUM_PIECES, gap_ms: float = GAP_MS
) -> Seen:
    """Take one stream to its end."""
    seen = Seen()
    body = {"model": "tiny", "prompt": f"stamp {num_pieces} {gap_ms}", "stream": True}
    began = time.monotonic()
    async with session.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            now = time.monotonic()
            if line.startswith(b"data: {"):
                seen.first_s = seen.first_s or now - began
                seen.ways_s.append(now - float(json.loads(line[6:])["choices"][0]["text"]))
    assert len(seen.ways_s) == num_pieces
    return seen


async def _pieces_per_s(session: aiohttp.ClientSession, url: str) -> float:
    num_pieces = 150
    began = time.perf_counter()
    await asyncio.gather(*(stream(session, url, num_pieces, TOKEN_MS) for _ in range(NUM_STREAMS)))
    return NUM_STREAMS * num_pieces / (time.perf_counter() - began)


async def _rounds_during_streams(server: GatewayProcess) -> Row:
    """Processor time of the rounds of the server's event loop, in which somebody else who asks something waits."""
    before = len(server.round_seconds())
    async with streams_beside(server, MANY_STREAMS, int(STATUS_S * 5), 200):
        pass
    rounds = [seconds * 1e3 for seconds in server.round_seconds()[before:]]
    what = f"a round of the event loop, {MANY_STREAMS} streams, CPU p99"
    return Row("gateway", what, "ms", "", rounds, limit=STATUS_MS / 2, percent=99)


async def _cpu_per_piece(server: GatewayProcess, ask: tuple[Any, str]) -> float:
    process, num_pieces = psutil.Process(server.pid), 100
    before = sum(process.cpu_times()[:2])
    await asyncio.gather(*(stream(*ask, num_pieces) for _ in range(NUM_STREAMS)))
    return (sum(process.cpu_times()[:2]) - before) * 1e3 / (NUM_STREAMS * num_pieces)


@asynccontextmanager
async def streams_beside(
    server: GatewayProcess, num_streams: int, num_pieces: int, gap_ms: float
) -> AsyncIterator[asyncio.subprocess.Process]:
    """So many streams in a process of their own; the block begins when all of them are being answered."""
    command = [sys.executable, "-m", "tests.bench.bodies.gateway_streams", f"{server.url}llmcloud/v1/completions"]
    command += [str(num_streams), str(num_pieces), str(gap_ms)]
    environment = {**os.environ, "LLMCLOUD_BENCH_KEY": server.key}
    process = await asyncio.create_subprocess_exec(*command, env=environment, cwd=REPOSITORY)
    try:
        async with asyncio.timeout(BEGIN_S):
            while await num_in_flight(server) < num_streams:
                await asyncio.sleep(0.05)
        yield process
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def num_in_flight(server: GatewayProcess) -> int:
    """Requests that the endpoint answers now."""
    url = f"{server.url}llmcloud/api/endpoints/tiny"
    async with aiohttp.ClientSession(headers=server.as_user) as session, session.get(url) as answer:
        return int((await answer.json())["rates"]["num_in_flight"])


async def _status_during_streams(server: GatewayProcess) -> list[float]:
    """Seconds that Jupyter's own status takes while many streams go on, each with 5 pieces a second."""
    samples = []
    async with (
        streams_beside(server, MANY_STREAMS, int(STATUS_S * 5) + 10, 200) as streams,
        aiohttp.ClientSession(headers=server.as_user) as session,
    ):
        ends = time.monotonic() + STATUS_S
        while time.monotonic() < ends and streams.returncode is None:
            began = time.monotonic()
            async with session.get(f"{server.url}llmcloud/api/status") as answer:
                assert answer.status == 200
                await answer.read()
            samples.append((time.monotonic() - began) * 1e3)
            await asyncio.sleep(0.02)
    return samples
