"""Requests that have ended are written down, whatever is in the way."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jupyter_llmcloud.server.audit import Audit
from jupyter_llmcloud.server.gateway import open_requests
from jupyter_llmcloud.server.gateway.key_alerts import KeyMonitor
from jupyter_llmcloud.server.gateway.open_requests import OpenRequests
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
