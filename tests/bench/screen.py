"""How long a logged value takes to the notebook, while both ranks compute.

In a real kernel, since only there the live view is a widget. Two times are taken for each value, both from the clock
reading that `run.log` itself stores with it:

- until the view of the run has it: `RunDisplay.records` of the kernel, which the harness wraps;
- until a front end has it: the first message of the widget that carries this step or a later one. The view draws at
  most ten times a second, so part of this is waiting for the next picture.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

from tests.bench import launch
from tests.bench.measured import Row
from tests.bench.shell import REPOSITORY, STOP, CellFailed, product_env

BODY = launch.BODIES / "log_while_training.py"
WARM_UP = 50  # values: the widget is being made
TIMEOUT_S = 180.0
Times = dict[int, float]  # of each step: seconds since the epoch

_WRAP = """\
import json, time
from jupyter_llmcloud.magics.output.run_view import RunDisplay
def _wrapped(inner, arrived):
    def records(self, journal, rank, batch):
        if journal == "metrics" and rank == 0:
            now = time.time()
            arrived.extend([record["step"], record["t"], now] for record in batch if "values" in record)
        inner(self, journal, rank, batch)
    return records
arrived = []
RunDisplay.records = _wrapped(RunDisplay.records, arrived)
"""
_TELL = "open({path!r}, 'w').write(json.dumps(arrived))"


def measure(folder: Path) -> list[Row]:
    """One run of some seconds."""
    folder.mkdir(parents=True)
    with _kernel(folder) as client:
        for cell in ("%load_ext jupyter_llmcloud", "%%distribute -n 2\npass", _WRAP):
            _run(client, cell)
        drawn = _run(client, f"%%distribute --name screen\n{BODY.read_text()}")
        _run(client, _TELL.format(path=str(folder / "arrived.json")))
        _run(client, STOP)
    arrived = json.loads((folder / "arrived.json").read_text())[WARM_UP:]
    logged = {step: t for step, t, _ in arrived}
    view = [1000 * (now - t) for _, t, now in arrived]
    front_end = [1000 * (when - logged[step]) for step, when in _first_seen(drawn, logged).items()]
    return [
        Row("logging", "from run.log to the run's view, p99", "ms", "", view, limit=200, percent=99),
        Row("logging", "from run.log to the widget's message, p50", "ms", "", front_end),
        Row("logging", "from run.log to the widget's message, p99", "ms", "", front_end, limit=200, percent=99),
    ]


def _first_seen(drawn: Times, logged: Times) -> Times:
    """When each step, or a later one, was first drawn."""
    return {
        step: when
        for step in logged
        if (when := min((at for shown, at in drawn.items() if shown >= step), default=None)) is not None
    }


@contextlib.contextmanager
def _kernel(folder: Path) -> Iterator[BlockingKernelClient]:
    env = {**os.environ, **product_env(folder / "ours")}
    manager, client = start_new_kernel(kernel_name="python3", env=env, cwd=str(REPOSITORY), stderr=subprocess.DEVNULL)
    try:
        yield client
    finally:
        manager.shutdown_kernel()  # not at once: what it has started is to end with it
        client.stop_channels()


def _run(client: BlockingKernelClient, cell: str) -> Times:
    """Execute a cell; when the front end was told of which step of the metric `loss`."""
    drawn: Times = {}
    failed: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        now = time.time()
        content = message["content"]
        if message["msg_type"] == "error":
            failed.append(f"{content['ename']}: {content['evalue']}")
        elif message["msg_type"] == "comm_msg":
            state = content["data"].get("state", {})
            if latest := state.get("info", {}).get("latest", {}).get("loss"):
                drawn.setdefault(int(latest["step"]), now)

    client.execute_interactive(cell, timeout=TIMEOUT_S, output_hook=hear)
    if failed:
        raise CellFailed(failed[0])
    return drawn
