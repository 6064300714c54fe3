"""A Jupyter server that is killed during a run and started again at its address: who watched goes on watching."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.errors import LLMCloudError
from tests.support.event_client import EventClient

pytest_plugins = ["tests.support.server_fixtures"]
pytestmark = pytest.mark.slow
TOKEN = "restarted"
NUM_STEPS = 100  # few enough for a column each
WAITS_AT = 40  # until the server that was killed is there again, however long that takes
LOGS = """import pathlib, time
for step in range({steps}):
    run.log(loss=1.0 / (step + 1), step=step)
    time.sleep(0.02)
    while step == {waits_at} and not pathlib.Path({let_go!r}).exists():
        time.sleep(0.05)
"""


@contextmanager
def jupyter_server(folder: Path, port: int, base_url: str) -> Iterator[tuple[subprocess.Popen[bytes], ServerClient]]:
    """`jupyter server` at a port of its own, below a base URL."""
    command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.base_url={base_url}", f"--IdentityProvider.token={TOKEN}"]
    command += ["--ServerApp.jpserver_extensions={'jupyter_llmcloud': True}"]
    with (folder / "jupyter.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    client = ServerClient(f"http://127.0.0.1:{port}{base_url}", TOKEN)
    try:
        wait_for(client, process)
        yield process, client
    finally:
        client.close()
        process.terminate()
        process.wait(timeout=60)


def wait_for(client: ServerClient, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client.status()
            return
        except (OSError, LLMCloudError):  # not there yet; the deadline decides
            time.sleep(0.05)
    raise AssertionError(f"the Jupyter server did not start: {process.poll()}")


def killed(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


async def connected(client: ServerClient, run_id: str = "", **knows: Any) -> EventClient:
    """A page that subscribes, with what it knows of before, and watches a run."""
    page = await EventClient.connect(client.url.rstrip("/"), TOKEN)
    await page.say("subscribe", topics=["runs"], **knows)
    await page.until(lambda: "runs" in page.items, 60)
    if run_id:
        await page.say("watch", run_id=run_id, points=2000)
    return page


def steps(page: EventClient) -> list[float]:
    return [step for step, _ in page.columns.get("loss", ())]


def is_whole(page: EventClient) -> bool:
    """From the first step on, each once and in order: neither a gap nor a double."""
    return steps(page) == [float(step) for step in range(len(steps(page)))]


def first_steps(client: ServerClient, run_id: str) -> list[float]:
    """As the REST route of a stretch of a series tells them."""
    answer = httpx.get(
        f"{client.url}llmcloud/api/runs/{run_id}/series",
        params={"metric": "loss", "to": 4},
        headers={"Authorization": f"token {TOKEN}"},
        timeout=60,
        trust_env=False,
    )
    return list(answer.json()["columns"]["mean"]["step"])


@pytest.mark.story
async def test_after_a_kill_during_a_run_and_one_after_it_everything_is_told_again_from_the_first_step(
    own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCLOUD_LEASE_S", "120")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, base_url = own_root.parent, "/user/ada%20lovelace/"
    try:
        await watched_over_restarts(folder, port, base_url)
    except BaseException:
        with jupyter_server(folder, port, base_url) as (_, client):
            stop_clusters(client)
        raise


def stop_clusters(client: ServerClient) -> None:
    for cluster in client.clusters():
        client.stop_cluster(cluster["name"])


async def watched_over_restarts(folder: Path, port: int, base_url: str) -> None:
    with jupyter_server(folder, port, base_url) as (process, client):
        let_go = folder / "let-go"
        code = LOGS.format(steps=NUM_STEPS, waits_at=WAITS_AT, let_go=str(let_go))
        started = await asyncio.to_thread(client.start_run, code, {"nproc": 2, "name": "kept"})
        run_id = str(started["run_id"])
        page = await connected(client, run_id)
        await page.until(lambda: len(steps(page)) >= 20, 120)
        before, epoch, cursor = steps(page), page.epoch, page.cursor
        assert page.items["runs"][run_id]["state"] == "running" and is_whole(page)
        killed(process)
    with jupyter_server(folder, port, base_url) as (process, client):
        page = await connected(client, run_id, epoch=epoch, cursor=cursor)
        assert page.epoch != epoch  # so that a cursor of before means nothing
        assert page.items["runs"][run_id]["state"] == "running"
        let_go.touch()
        await page.until(lambda: len(steps(page)) > max(len(before), WAITS_AT) + 10, 120)
        assert is_whole(page)
        assert first_steps(client, run_id) == [0.0, 1.0, 2.0, 3.0, 4.0]
        await page.until(lambda: page.info.get("state") == "finished", 180)
        await page.until(lambda: len(steps(page)) == NUM_STEPS, 60)
        assert is_whole(page)
        epoch, cursor = page.epoch, page.cursor
        killed(process)
    with jupyter_server(folder, port, base_url) as (_, client):
        page = await connected(client, run_id, epoch=epoch, cursor=cursor)
        await page.until(lambda: len(steps(page)) == NUM_STEPS and page.info, 60)
        assert is_whole(page) and page.info["state"] == "finished"
        assert page.items["runs"][run_id]["state"] == "finished"
        shown = client.ask("GET", f"runs/{run_id}/view")
        assert "loss" in shown["html"] and "time of rank" in shown["html"]
        await page.close()
        stop_clusters(client)
