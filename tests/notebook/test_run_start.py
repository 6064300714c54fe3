"""A run whose ranks are not there yet is seen from the moment on that its cell is executed: in the cell, by the server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from tests.support.worlds import until

pytestmark = pytest.mark.slow
PANEL = "application/vnd.jupyter-llmcloud.panel+json"


@pytest.fixture
def kernel(own_root: Any) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    """A kernel without a cluster, and its client."""
    manager, client = start_new_kernel()
    client.execute_interactive(
        "%load_ext jupyter_llmcloud", store_history=False, timeout=60, output_hook=lambda _: None
    )
    yield manager, client
    client.execute_interactive("%cluster stop", timeout=60, output_hook=lambda _: None)
    client.stop_channels()
    manager.shutdown_kernel()


def displays(client: BlockingKernelClient, number: int, timeout_s: float = 60.0) -> list[dict[str, Any]]:
    """The data of the next so many displays and updates."""
    found: list[dict[str, Any]] = []
    while len(found) < number:
        message = client.get_iopub_msg(timeout=timeout_s)
        if message["msg_type"] in ("display_data", "update_display_data"):
            found.append(message["content"]["data"])
    return found


def record() -> RunRecord | None:
    runs = RunStore().list()
    return runs[0] if runs else None


@pytest.mark.story
def test_a_first_cell_shows_what_is_done_at_once_and_then_its_run(
    kernel: tuple[KernelManager, BlockingKernelClient],
) -> None:
    _, client = kernel
    began = time.time()
    client.execute("%%distribute -n 2 --name first\nimport time\nrun.log(loss=1.0, step=0)\ntime.sleep(1)")
    [finding] = displays(client, 1)
    assert time.time() - began < 3.0
    assert finding["text/plain"] == "first · finding a cluster …" and finding[PANEL]["name"] == "first"
    known = until(record, "the run has a record")
    assert known.run_id == finding[PANEL]["id"] and known.state == "queued"
    assert known.history[0]["phase"] == "finding a cluster" and abs(known.history[0]["t"] - began) < 3.0
    [starting] = displays(client, 1)
    assert starting["text/plain"] == "first · starting ranks …"
    [live] = displays(client, 1)
    assert live[PANEL]["id"] == known.run_id and "first · running on ranks 0-1" in live["text/plain"]
    [ended] = displays(client, 1)
    assert "finished" in ended["text/html"]
    told = RunStore().folder(known.run_id).read()
    assert [entry["phase"] for entry in told.history if "phase" in entry] == [
        "finding a cluster",
        "starting ranks",
        "joining",
    ]
    assert told.starter == {} and told.state == "finished"

    refused(client)


def refused(client: BlockingKernelClient) -> None:
    """Of a cell that is refused before it has ranks nothing is left: neither a card nor a record."""
    client.execute_interactive("%world stop", timeout=60, output_hook=lambda _: None)
    known = {run.run_id for run in RunStore().list()}
    client.execute("%%distribute -n 500 --name refused\nprint(1)")
    [finding, blank] = displays(client, 2)
    assert finding["text/plain"] == "refused · finding a cluster …"
    assert blank == {"text/plain": "", "text/html": ""}
    assert {run.run_id for run in RunStore().list()} == known
