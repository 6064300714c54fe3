"""What it takes of the time of training when a worker is lost and another one comes: 2 -> 1 -> 2 ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from jupyter_llmcloud.cluster.agent_info import AgentInfo
from tests.bench.measured import Row
from tests.chaos.elastic import CODE, STEP_S, gaps, turns
from tests.support.clusters import Server
from tests.support.worlds import until

ROUNDS = 5
EPOCHS = 12  # of 125 steps
KILL_AT = 100


def measure(folder: Path) -> list[Row]:
    """One run for each round; of the rank that follows the whole worker is killed, with its agent and what that forked.

    So nothing of it is left that could go on at once; the nanny starts another worker, which is a few seconds' work.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCLOUD_ROOT", str(folder / "root"))
        patch.setenv("LLMCLOUD_RUNTIME_DIR", str(folder / "run"))
        server = Server()
        try:
            server.do(server.pool.start("local", "resize", 2, {"slots": 1}))
            lost = [_resized(server) for _ in range(ROUNDS)]
        finally:
            server.end()
    return [Row("resize", "2 -> 1 -> 2 ranks: seconds in which nothing new is trained", "s", "", lost, limit=10.0)]


def _resized(server: Server) -> float:
    until(lambda: sum(agent.free_slots for agent in server.agents()) == 2, "both workers are free", 120)
    world = server.world(2)
    running = world.send(
        f"EPOCHS, PAUSE = {EPOCHS}, {STEP_S}\n{CODE}", elastic="1:2", max_restarts=1, background=True, name="resize"
    )
    run = running.outcome.folder
    until(lambda: len(turns(run)) > KILL_AT, "it trains", 120)
    follower = next(agent for agent in server.agents() if agent.held and not agent.worlds)
    _kill(follower)
    until(lambda: not run.read().is_active, "it has ended", 300)
    record = run.read()
    if (record.state, record.num_resizes) != ("finished", 2):
        raise AssertionError(f"{record.state} after {record.num_resizes} resizes: {record.history}")
    world.end()
    print(f"  {[change['why'] for change in record.history if 'ranks' in change.get('why', '')]}")
    return sum(gaps(run))


def _kill(agent: AgentInfo) -> None:
    """As when its machine has gone."""
    port = int(agent.worker.rpartition(":")[2])
    pid = json.loads(Path(agent.home).with_name("agent.json").read_text())["pid"]
    below = [process.pid for process in psutil.Process(pid).children(recursive=True)]
    listening = [row.pid for row in psutil.net_connections("tcp") if row.status == "LISTEN" and row.laddr.port == port]
    for process in (*filter(None, listening), pid, *below):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
