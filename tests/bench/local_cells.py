"""What a notebook feels of a very busy run that it shows: how soon another cell answers, how large its file becomes.

A feeder writes what 16 ranks with 1,000 points a second each would log, for a minute. A kernel shows the run by its
handle's card, and executes a cell of its own four times a second meanwhile, as its user would.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

from tests.bench.measured import Row
from tests.bench.shell import REPOSITORY

NUM_RANKS, PER_S, SECONDS = 16, 1000, 60.0
EVERY_S = 0.25
ALONE_S = 15.0  # without a run, on the same machine
DEADLINE_S = 120.0
SHOW = "import jupyter_llmcloud as lc\nlc.runs.get('fed-1')"


def measure(folder: Path) -> list[Row]:
    """A minute and a half."""
    folder.mkdir(parents=True)
    env = {**os.environ, "LLMCLOUD_ROOT": str(folder / "root"), "LLMCLOUD_RUNTIME_DIR": str(folder / "run")}
    words = [str(folder), str(NUM_RANKS), str(PER_S), str(SECONDS + 10)]
    with _server(folder, env) as told, contextlib.ExitStack() as stack:
        env |= {"LLMCLOUD_SERVER_URL": told["url"], "LLMCLOUD_SERVER_TOKEN": told["token"]}
        manager, client = start_new_kernel(env=env)
        stack.callback(manager.shutdown_kernel)
        stack.callback(client.stop_channels)
        notebook = _Outputs(client)
        alone = notebook.answers(ALONE_S)
        feeder = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bodies.feed_run", *words], env=env, cwd=REPOSITORY
        )
        stack.callback(feeder.wait, DEADLINE_S)
        while not (folder / "root" / "runs" / "fed-1" / "run.json").exists():
            time.sleep(0.05)
        notebook.execute(SHOW)
        answers = notebook.answers(SECONDS)
        feeder.wait(DEADLINE_S)
        notebook.wait(3.0)
    what = f"{NUM_RANKS} ranks with {PER_S:,} points/s, shown for {SECONDS:.0f} s"
    return [
        Row("cells", f"{what}: a local cell answers, p95", "ms", "no run", answers, alone, limit=100, percent=95),
        Row("cells", f"{what}: outputs in the notebook file", "kB", "", [notebook.size / 1000], limit=1000),
        Row("cells", f"{what}: sent to the page by the kernel", "kB/s", "", [notebook.num_sent / 1000 / SECONDS]),
    ]


@contextlib.contextmanager
def _server(folder: Path, env: dict[str, str]) -> Iterator[dict[str, Any]]:
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    told_at = folder / "server.json"
    command = [sys.executable, "-P", "-m", "jupyter_llmcloud.server.headless", "--owner-pid", str(owner.pid)]
    server = subprocess.Popen([*command, "--announce", str(told_at)], env=env, stderr=subprocess.DEVNULL)
    try:
        while not told_at.exists():
            time.sleep(0.05)
        yield json.loads(told_at.read_text())
    finally:
        owner.communicate(b"")
        server.wait(DEADLINE_S)


class _Outputs:
    """The outputs of a notebook, as they would be saved.

    Attributes:
        num_sent: bytes of all that the kernel has sent to its page, states of widgets included.
    """

    def __init__(self, client: BlockingKernelClient) -> None:
        self.num_sent = 0
        self._client = client
        self._kept: list[dict[str, Any]] = []
        self._displays: dict[str, dict[str, Any]] = {}

    @property
    def size(self) -> int:
        """Bytes of the outputs in a saved file."""
        return len(json.dumps(self._kept))

    def execute(self, code: str) -> float:
        """Seconds until the cell has its answer."""
        began = time.perf_counter()
        identity = self._client.execute(code)
        while True:
            reply = self._client.get_shell_msg(timeout=DEADLINE_S)
            if reply["parent_header"].get("msg_id") == identity:
                assert reply["content"]["status"] == "ok", reply["content"]
                return time.perf_counter() - began

    def answers(self, seconds: float) -> list[float]:
        """Milliseconds that each of the cells takes which are executed meanwhile."""
        found = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found.append(1000 * self.execute("1 + 1"))
            self.wait(EVERY_S)
        return found

    def wait(self, seconds: float) -> None:
        """Take what the kernel sends meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(Empty):
                self._take(self._client.get_iopub_msg(timeout=left))

    def _take(self, message: dict[str, Any]) -> None:
        content, kind = message["content"], message["msg_type"]
        self.num_sent += len(json.dumps(content))
        display_id = (content.get("transient") or {}).get("display_id", "")
        if kind in ("display_data", "execute_result"):
            self._kept.append({"output_type": kind, "data": content["data"]})
            self._displays[display_id] = self._kept[-1]
        elif kind == "update_display_data" and display_id in self._displays:
            self._displays[display_id]["data"] = content["data"]
        elif kind in ("stream", "error"):
            self._kept.append({"output_type": kind, **content})
