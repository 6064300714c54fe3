"""Many streams, clients that hang up, and a replica killed every minute: does anybody notice but those it answered?

Sixteen clients ask an endpoint with two replicas, one stream after the other; some hang up in the middle. Every minute
a replica gets SIGKILL. A stream may end with an error event only if the replica that answered it was killed, which the
server's table of usage tells; no stream may end without [DONE] or an error; memory may not grow; in the end nothing is in
flight.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.magics.serving.endpoint import Endpoint
from jupyter_llmcloud.storage.server_state import ServerState
from tests.support.headless import headless_server
from tests.support.tiny_models import save_tiny_llama

NUM_STREAMS = 16
KILL_EVERY_S = 60.0
ABORTS = 0.2  # the share of streams whose client hangs up
REPLACED_S = 10.0
WRITTEN_S = 10.0  # until the usage of a request is in the table
MAX_GROWTH = 1.15  # of memory, from the first third to the last
MODEL = "soak"


@dataclass
class Seen:
    """What the clients saw."""

    num_done: int = 0
    num_aborted: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # the id of each request, and what was seen
    first_token_s: list[float] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)  # the ids of the replicas
    back_s: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def unexplained(self, state: ServerState) -> list[str]:
        """Errors of streams that were not answered by a replica which was killed. Rows are written after requests."""
        deadline = time.monotonic() + WRITTEN_S
        while any(state.request(row) is None for row, _ in self.failed) and time.monotonic() < deadline:
            time.sleep(0.1)
        rows = [(state.request(request_id), what) for request_id, what in self.failed]
        return [f"{what} ({row})" for row, what in rows if row is None or row["replica"] not in self.killed]


def main(minutes: float = 10, seed: int = 0) -> bool:
    """Print the figures; returns whether every promise held."""
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder, headless_server("soak") as client:
        model = save_tiny_llama(Path(folder) / "model")
        client.create_endpoint(str(model), name=MODEL, replicas=2)
        while client.endpoint(MODEL, wait_s=20)["state"] == "starting":
            pass
        endpoint = Endpoint(MODEL, client)
        seen = asyncio.run(_soak(endpoint.base_url, endpoint.api_key, client, minutes * 60, random.Random(seed)))
        ok = _tell(seen, client.endpoint(MODEL)["rates"])
        client.stop_endpoint(MODEL)
    return ok


async def _soak(url: str, key: str, client: ServerClient, seconds: float, draw: random.Random) -> Seen:
    seen, end = Seen(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60, limits=limits, trust_env=False
    ) as http:
        streams = [_ask(http, seen, end, random.Random(draw.random())) for _ in range(NUM_STREAMS)]
        await asyncio.gather(_kill(client, seen, end, draw), _weigh(client, seen, end), *streams)
    return seen


async def _ask(http: httpx.AsyncClient, seen: Seen, end: float, draw: random.Random) -> None:
    while time.monotonic() < end:
        hang_up_after = draw.randint(1, 20) if draw.random() < ABORTS else None
        body = {
            "model": MODEL,
            "prompt": [draw.randint(3, 60) for _ in range(draw.randint(1, 24))],
            "max_tokens": draw.randint(8, 32),
            "temperature": draw.choice([0, 1]),
            "stream": True,
        }
        request_id, what = await _stream(http, body, hang_up_after, seen)
        if what == "done":
            seen.num_done += 1
        elif what == "aborted":
            seen.num_aborted += 1
        else:
            seen.failed.append((request_id, what))
            await asyncio.sleep(0.2)


async def _stream(
    http: httpx.AsyncClient, body: dict[str, Any], hang_up_after: int | None, seen: Seen
) -> tuple[str, str]:
    """The id of the request, and how it ended: done, aborted, or in other words."""
    began, num_events, last, request_id = time.monotonic(), 0, "", ""
    try:
        async with http.stream("POST", "/completions", json=body) as answer:
            request_id = answer.headers.get("X-Request-Id", "")
            if answer.status_code != 200:
                return request_id, f"{answer.status_code}: {(await answer.aread()).decode(errors='replace')[:200]}"
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if num_events == 0:
                    seen.first_token_s.append(time.monotonic() - began)
                num_events += 1
                last = line.removeprefix("data: ")
                if hang_up_after is not None and num_events >= hang_up_after:
                    return request_id, "aborted"
    except httpx.HTTPError as error:
        return request_id, f"{type(error).__name__}: {error}"
    if last == "[DONE]":
        return request_id, "done"
    told = json.loads(last) if last.startswith("{") else {}
    how = f"error event: {told['error']['message']}" if "error" in told else "ended without [DONE] or an error"
    return request_id, how


async def _kill(client: ServerClient, seen: Seen, end: float, draw: random.Random) -> None:
    while time.monotonic() + KILL_EVERY_S / 2 < end:
        await asyncio.sleep(min(KILL_EVERY_S, end - time.monotonic()) / 2)
        ready = [row for row in await _replicas(client) if row["state"] == "ready"]
        victim = draw.choice(ready)
        os.kill(victim["pid"], signal.SIGKILL)
        killed = time.monotonic()
        seen.killed.append(victim["id"])
        while not await _is_replaced(client, victim["id"]):
            if time.monotonic() - killed > KILL_EVERY_S:
                break
            await asyncio.sleep(0.2)
        seen.back_s.append(time.monotonic() - killed)
        await asyncio.sleep(max(0.0, KILL_EVERY_S / 2 - seen.back_s[-1]))


async def _replicas(client: ServerClient) -> list[dict[str, Any]]:
    told = await asyncio.to_thread(client.endpoint, MODEL)
    return list(told["replicas"])


async def _is_replaced(client: ServerClient, victim: str) -> bool:
    rows = await _replicas(client)
    ready = [row for row in rows if row["state"] == "ready"]
    return all(row["id"] != victim for row in rows) and len(ready) == 2


async def _weigh(client: ServerClient, seen: Seen, end: float) -> None:
    """The memory of the server, which lives through all of it."""
    pid = (await asyncio.to_thread(client.status))["pid"]
    server = psutil.Process(pid)
    began = time.monotonic()
    while time.monotonic() < end:
        seen.memory.append((time.monotonic() - began, server.memory_info().rss))
        await asyncio.sleep(2)


def _tell(seen: Seen, left: dict[str, Any]) -> bool:
    state = ServerState()
    unexplained = seen.unexplained(state)
    state.close()
    third = max(1, len(seen.memory) // 3)
    first, last = (statistics.median(size for _, size in part) for part in (seen.memory[:third], seen.memory[-third:]))
    ordered = sorted(seen.first_token_s)
    print(
        f"serving: {seen.num_done} streams done, {seen.num_aborted} hung up, {len(seen.failed)} failed at "
        f"{len(seen.killed)} kills of replicas, {len(unexplained)} of them not the killed one's own; replaced after "
        f"{statistics.median(seen.back_s):.1f} s (worst {max(seen.back_s):.1f}); first event p50 "
        f"{ordered[len(ordered) // 2] * 1000:.0f} ms, p95 {ordered[int(len(ordered) * 0.95)] * 1000:.0f} ms; the server's "
        f"memory {first / 2**20:.0f} -> {last / 2**20:.0f} MiB; {left['num_in_flight']} in flight in the end",
        flush=True,
    )
    for what in unexplained[:10]:
        print(f"  unexplained: {what}")
    return not unexplained and left["num_in_flight"] == 0 and last <= first * MAX_GROWTH and seen.num_done > 0
