"""Requests that have ended are written down, whatever is in the way."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jupyter_llmcloud.server.audit import Audit
from jupyter_llmcloud.server.gateway import open_requests
from jupyter_llmcloud.server.gateway.key_alerts import KeyMonitor
from jupyter_llmcloud.server.gateway.open_requests import OpenRequest, OpenRequests
from jupyter_llmcloud.storage.server_state import RequestRecord, ServerState


async def test_rows_that_wait_for_a_thread_when_the_server_ends_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_requests, "WRITE_EVERY_S", 0.0)
    state, log = ServerState(tmp_path / "server.sqlite"), logging.getLogger()
    told: list[RequestRecord] = []
    requests = OpenRequests(state, KeyMonitor(Audit(state, None, log), log), log, told.extend)
    loop, released = asyncio.get_running_loop(), threading.Event()
    with ThreadPoolExecutor(1) as busy:
        loop.set_default_executor(busy)
        busy.submit(released.wait)
        while busy._work_queue.qsize():
            time.sleep(0.001)
        requests.write_down(RequestRecord("req-1", "user", "tiny", "completions", 200, 0.1, t=time.time()))
        while not busy._work_queue.qsize():  # the row waits for its turn
            await asyncio.sleep(0)
        threading.Timer(0.05, released.set).start()
        await requests.close()
    assert [row["request_id"] for row in state.usage()] == ["req-1"] == [record.request_id for record in told]
    state.close()


async def test_a_revoked_key_is_found_out_after_a_look_at_the_keys_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that was locked for a moment ended the looking: what the key had open streamed on."""
    monkeypatch.setattr(open_requests, "KEY_CHECK_EVERY_S", 0.01)
    state, log = ServerState(tmp_path / "server.sqlite"), logging.getLogger()
    requests = OpenRequests(state, KeyMonitor(Audit(state, None, log), log), log, lambda _: None)
    looks: list[str] = []

    def key(key_id: str) -> None:
        looks.append(key_id)
        if len(looks) == 1:
            raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(state, "key", key)
    requests.begin(request := OpenRequest(key_id="revoked"))
    async with asyncio.timeout(20):
        while request.cut_by is None:
            await asyncio.sleep(0.01)
    assert request.cut_by is open_requests.KEY_REVOKED
    requests.end(request, RequestRecord("req-1", "key:revoked", "tiny", "completions", 401, 0.1, t=time.time()))
    await requests.close()
    state.close()
