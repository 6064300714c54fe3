"""What it takes of the time of training when a worker is lost and another one comes: 2 -> 1 -> 2 ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.bench.measured import Row
from tests.chaos.elastic import CODE, STEP_S, gaps, turns
from tests.support.clusters import Server
from tests.support.worlds import until

ROUNDS = 5
EPOCHS = 12  # of 125 steps
KILL_AT = 100


def measure(folder: Path) -> list[Row]:
    """One run for each round; the agent of the rank that follows is killed, and replaced by its Dask worker."""
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
    os.kill(json.loads(Path(follower.home).with_name("agent.json").read_text())["pid"], signal.SIGKILL)
    until(lambda: not run.read().is_active, "it has ended", 300)
    record = run.read()
    if (record.state, record.num_resizes) != ("finished", 2):
        raise AssertionError(f"{record.state} after {record.num_resizes} resizes: {record.history}")
    world.end()
    return sum(gaps(run))
