"""The leading agent of a notebook's run is killed: the cell goes on, Stop stops, a background run finishes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_llmcloud import config
from jupyter_llmcloud.storage.runs import RunFolder, RunStore
from tests.notebook.test_runs_outlive import Kernel
from tests.support.resuming import COMMON
from tests.support.worlds import numbered_lines, until

pytest_plugins = ["tests.support.server_fixtures"]
pytestmark = pytest.mark.slow

# Steps that are told as lines, and a pause in which somebody kills the agent. What follows is quick.
TRAINS = (
    COMMON
    + """
from torch.nn.parallel import DistributedDataParallel
model = DistributedDataParallel(net())
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
for step in run.steps(40):
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    print("line", step, flush=True)
    run.log(step=step, at=step)
    if step == 20 and not run.resumed_step:
        while True:
            time.sleep(0.01)
kept = step
"""
)


def _cell(name: str, options: str = "") -> str:
    return f"%%distribute {options} -n 2 --name {name} --checkpoint-every 5 --max-restarts 2\n{TRAINS}"


@pytest.fixture
def kernel(headless_root: Path) -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.end()


def _agents() -> list[dict[str, Any]]:
    """What the living agents of this test said of themselves."""
    told = [json.loads(path.read_text()) for path in (config.runtime_dir() / "c").glob("*/a*/agent.json")]
    return [agent for agent in told if psutil.pid_exists(agent["pid"])]


def _at_its_place(name: str) -> RunFolder:
    """The run, when it waits in its twentieth step and has saved what came before."""

    def find() -> RunFolder | None:
        found = [record for record in RunStore().list() if record.name == name]
        folder = RunStore().folder(found[0].run_id) if found else None
        if folder is None or not any(row.get("step") == 20 for rank, row in folder.records("metrics") if rank):
            return None
        return folder if any((folder.path / "checkpoints").glob("step-*")) else None

    return until(find, "the run is at its place", 90)  # type: ignore[no-any-return]


@pytest.mark.story
def test_a_cell_goes_on_when_its_agent_is_killed_and_stop_and_a_background_run_work_likewise(kernel: Kernel) -> None:
    shown: list[str] = []
    sent = kernel.client.execute(_cell("cell"))
    _at_its_place("cell")
    [agent] = _agents()
    os.kill(agent["pid"], signal.SIGKILL)
    _hear_the_end(kernel, sent, shown)
    text = "".join(shown)
    assert "the agent that led the run was lost; resumed from step" in text, text
    assert {rank: set(lines) for rank, lines in numbered_lines(text).items()} == {0: set(range(40)), 1: set(range(40))}
    assert kernel.run("%%distribute\nprint('kept is', kept)") == "[0-1] kept is 39\n"
    assert [told["pid"] for told in _agents()] != [agent["pid"]]

    shown.clear()
    sent = kernel.client.execute(_cell("stopped"))
    folder = _at_its_place("stopped")
    os.kill(_agents()[0]["pid"], signal.SIGKILL)
    pressed = time.monotonic()
    kernel.manager.interrupt_kernel()
    _hear_the_end(kernel, sent, shown)
    assert time.monotonic() - pressed < 8
    assert "KeyboardInterrupt" in "".join(shown)
    assert folder.read().state == "stopped"

    kernel.run(_cell("behind", "-b"))
    folder = _at_its_place("behind")
    os.kill(_agents()[0]["pid"], signal.SIGKILL)
    until(lambda: not folder.read().is_active, "the run has ended", 60)
    assert folder.read().state == "finished"
    assert "kept is 39" in kernel.run("%%distribute\nprint('kept is', kept)"), "its world is this notebook's"


def _hear_the_end(kernel: Kernel, sent: str, shown: list[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        message = kernel.client.get_iopub_msg(timeout=90)
        if message["parent_header"].get("msg_id") != sent:
            continue
        content = message["content"]
        shown += [content.get("text", ""), *content.get("traceback", [])]
        if content.get("execution_state") == "idle":
            return
    pytest.fail(f"the cell has not ended: {''.join(shown)}")
