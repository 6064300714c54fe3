"""SIGKILL to leading agents at random moments of a training, half of them while they replace a rank: another agent goes
on, to the same weights, once.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from typing import Any

from jupyter_llmcloud.storage.journal import read_all
from tests.chaos.figures import counts, seconds
from tests.support.resuming import CELLS, cell, results, same
from tests.support.worlds import AgentProcess, Ranks, until

KILLS = 20
LASTS_S = 2.5  # a training, about
HEALS_S = 1.5
SLOWER = ("    once = run.folder", "    time.sleep(0.05)\n    once = run.folder")


def main(kills: int = KILLS, seed: int = 7) -> bool:
    """Print what came of it; whether every run went on as promised."""
    source, times, ends, wrong = random.Random(seed), [], Counter[str](), []
    names = [name for name in CELLS if name not in ("workers", "dispatched", "stream", "trainer")]
    agents = [AgentProcess(), AgentProcess()]
    try:
        wanted = {name: _undisturbed(agents, name) for name in names}
        for _ in range(kills):
            name = source.choice(names)
            outcome, took_s, is_same = _kill(agents, name, source, wanted[name])
            ends[outcome] += 1
            times += [took_s] if took_s else []
            if not is_same:
                wrong.append(f"{name}: {outcome}")
            agents[:] = [agents[1], AgentProcess()]
    finally:
        for agent in agents:
            agent.end()
    print(
        f"leader kills: {kills} ({counts(ends)}); final state not the same to the last bit {len(wrong)} {wrong or ''}; "
        f"training again after {seconds(times)}"
    )
    return not wrong


def _undisturbed(agents: list[AgentProcess], name: str) -> list[dict[str, Any]]:
    world = _world(agents)
    world.ok(cell(name))
    wanted = results(world)
    world.end()
    return wanted


def _world(agents: list[AgentProcess]) -> Ranks:
    return Ranks(agents[0], 2, shares=[(agents[0], 1), (agents[1], 1)])


def _kill(
    agents: list[AgentProcess], name: str, source: random.Random, wanted: list[dict[str, Any]]
) -> tuple[str, float, bool]:
    """How it ended, how long nobody trained, and whether all is as without the kill."""
    world = _world(agents)
    pids = world.pids()
    running = world.send(cell(name).replace(*SLOWER), checkpoint_every=source.randint(1, 5), max_restarts=3)
    folder = running.outcome.folder
    until((folder.path / "run.json").exists, "the run has begun")
    time.sleep(source.uniform(0.0, LASTS_S))  # the moment is the experiment
    if source.random() < 0.5:  # while it replaces a rank, under a new claim or about to make one
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[0], signal.SIGKILL)
        time.sleep(source.uniform(0.0, HEALS_S))
    killed_at = time.time()
    agents[0].end_by_force()
    until(lambda: not folder.read().is_active, f"{name} has ended", 90)
    record = folder.read()
    if record.ended < killed_at:
        return "came too late", 0.0, True
    mine = world.beside(agents[1])
    is_same = record.state == "finished" and all(map(same, wanted, results(mine)))
    mine.end()
    moments = [row["t"] for row in read_all(folder.metrics(0)) if row["t"] > killed_at]
    why = " ".join(str(entry.get("why", "")) for entry in record.history)
    how = "resumed" if "resumed from step" in why else "from the start" if record.num_restarts else record.state
    return how, moments[0] - killed_at if moments else 0.0, is_same


if __name__ == "__main__":
    import sys

    sys.exit(0 if main() else 1)
