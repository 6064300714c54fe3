"""What a page that watches a very busy run costs the server, and how far it is behind.

A feeder writes what 16 ranks with 1,000 points a second each would log; a real server follows it, and one client watches
by the websocket as a page does. The delay of a message is the time since its newest value was written.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.bench import pages
from tests.bench.measured import Row
from tests.bench.shell import REPOSITORY
from tests.support.event_client import EventClient

NUM_RANKS, PER_S, SECONDS = 16, 1000, 30.0
WARM_UP_S = 3.0
DEADLINE_S = 120.0


def measure(folder: Path) -> list[Row]:
    """Two minutes."""
    folder.mkdir(parents=True)
    return [*asyncio.run(_measure(folder)), *pages.measure(folder / "pages")]


async def _measure(folder: Path) -> list[Row]:
    env = {**os.environ, "LLMCLOUD_ROOT": str(folder / "root"), "LLMCLOUD_RUNTIME_DIR": str(folder / "run")}
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    told_at = folder / "server.json"
    command = [sys.executable, "-P", "-m", "jupyter_llmcloud.server.headless", "--owner-pid", str(owner.pid)]
    server = subprocess.Popen([*command, "--announce", str(told_at)], env=env, stderr=subprocess.DEVNULL)
    try:
        while not told_at.exists():
            await asyncio.sleep(0.05)
        told = json.loads(told_at.read_text())
        words = [str(folder), str(NUM_RANKS), str(PER_S), str(SECONDS)]
        feeder = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bodies.feed_run", *words], env=env, cwd=REPOSITORY
        )
        while not (folder / "root" / "runs" / "fed-1" / "run.json").exists():
            await asyncio.sleep(0.05)
        client = await EventClient.connect(told["url"].rstrip("/"), told["token"])
        rows = await _watch(client, psutil.Process(server.pid))
        await client.close()
        feeder.wait(DEADLINE_S)
        return rows
    finally:
        owner.communicate(b"")
        server.wait(DEADLINE_S)


async def _watch(client: EventClient, server: psutil.Process) -> list[Row]:
    await client.say("watch", run_id="fed-1")
    delays: list[float] = []
    began = before = 0.0
    while client.info.get("state") != "finished":
        message = await client.read(DEADLINE_S)
        assert message is not None, "the server has closed the connection"
        now = time.time()
        if not began and client.info and now - client.info["created"] > WARM_UP_S:
            began, before = now, sum(server.cpu_times()[:2])
        if began and message["type"] == "run_series":
            delays += [1000 * (now - tail["time"][-1]) for tail in message["series"] if tail["time"]]
            ended, after = now, sum(server.cpu_times()[:2])
    took = ended - began
    what = f"{NUM_RANKS} ranks with {PER_S:,} points/s"
    return [
        Row("panels", f"{what}: from a value's write to the page's message, p50", "ms", "", delays),
        Row(
            "panels",
            f"{what}: from a value's write to the page's message, p95",
            "ms",
            "",
            delays,
            limit=300,
            percent=95,
        ),
        Row("panels", f"{what}: batches a second", "", "", [len(delays) / took]),
        Row("panels", f"{what}: cores that the server takes", "", "", [(after - before) / took], limit=1.0),
    ]
