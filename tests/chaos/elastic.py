"""SIGKILL to an agent of an elastic run again and again, on a real Dask cluster that replaces it.

    python -m tests.chaos elastic          five minutes, a kill every 15 s
    python -m tests.chaos elastic:25:15    25 minutes
    python -m tests.chaos elastic:5:15:7:1 with another source of chance than 7; ranks hold their last iteration whatever that costs

A ledger counts each row of each epoch, and folds their order into one number; both, and the losses, must be those of a
run that nobody disturbed. A kill costs what passes from it until the run is further than it has ever been.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from jupyter_llmcloud.storage.journal import read_all
from jupyter_llmcloud.storage.runs import RunFolder
from tests.chaos.figures import counts, seconds
from tests.support.clusters import Server
from tests.support.worlds import AgentElsewhere, Ranks, until

MINUTES, EVERY_S = 5.0, 15.0
WORKERS = 3  # one more than ranks: what is killed takes seconds to come back, on a busy machine more than EVERY_S
STEP_S = 0.03
CODE = """
import time, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(1)
accelerator = Accelerator()
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).double()
x = torch.randn(1000, 16, dtype=torch.float64)
data = TensorDataset(torch.arange(1000), x, x.sin().sum(1, keepdim=True))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4, shuffle=True))
seen, order, turn, whole, losses = torch.zeros(1000, dtype=torch.long), 0, 0, True, []
for epoch in range(EPOCHS):
    for rows, inputs, wanted in loader:
        each = (model(inputs) - wanted).square()
        accelerator.backward(each.mean())
        optimizer.step()
        optimizer.zero_grad()
        for row in accelerator.gather(rows).tolist():
            seen[row] += 1
            order = (order * 1009 + row) % 998244353
        turn += 1
        run.log(turn=turn, size=world_size, epoch=epoch)
        time.sleep(PAUSE)
    whole = whole and bool((seen == epoch + 1).all())
    losses.append(accelerator.gather(each.detach()).mean().item())
ledger = {"turn": turn, "order": order, "whole": whole, "losses": losses}
"""
STEPS_PER_EPOCH = 125


# As where steps are long: a rank holds its last iteration, and tensors of whatever size are left where they are.
HOLDS = """
from jupyter_llmcloud.training.checkpoint import borrower
from jupyter_llmcloud.training.resume import last_state
last_state.SHARE, borrower.SMALL = 1e9, 1
"""


def main(minutes: float = MINUTES, every_s: float = EVERY_S, seed: float = 7, holds: float = 0) -> bool:
    """Print what came of it; whether the run was as if it had been left alone."""
    server = Server()
    try:
        server.do(server.pool.start("local", "elastic", WORKERS, {"slots": 1}))
        until(lambda: len(server.agents()) == WORKERS, "all workers are there", 120)
        return _measured(server, minutes, every_s, random.Random(int(seed)), _held() if holds else CODE)
    finally:
        server.end()


def _held() -> str:
    """The time of a step passes before that of the optimizer, as forward and backward take it."""
    pause = "        time.sleep(PAUSE)\n"
    begin = "    for rows, inputs, wanted in loader:\n"
    return HOLDS + CODE.replace(pause, "").replace(begin, begin + pause)


def _measured(server: Server, minutes: float, every_s: float, source: random.Random, code: str) -> bool:
    epochs = max(2, round(minutes * 60 / (STEP_S * STEPS_PER_EPOCH)))
    world = server.world(2)
    undisturbed = world.send(f"EPOCHS, PAUSE = {epochs}, 0\n{code}").end(60 + 60 * minutes)
    assert undisturbed.state == "finished", undisturbed.report
    wanted = world.pull("ledger")
    running = world.send(
        f"EPOCHS, PAUSE = {epochs}, {STEP_S}\n{code}",
        elastic="1:2",
        max_restarts=3,
        background=True,
        name="elastic",
    )
    folder = running.outcome.folder
    kills = _kill_until_it_ends(server, folder, every_s, source)
    record = folder.read()
    found = _world_of(server, world).pull("ledger") if record.state == "finished" else None
    lost, back = _lost(folder, kills)
    still = sum(gaps(folder))
    is_same = found is not None and _is_same(found, wanted)
    print(
        f"elastic: {record.state} after {epochs * STEPS_PER_EPOCH} steps with {len(kills)} kills "
        f"({counts(Counter(who for _, who in kills))}), {record.num_resizes} resizes, {record.num_restarts} restarts "
        f"used up; ledger and losses {'as undisturbed' if is_same else f'NOT as undisturbed: {found} {wanted}'}; "
        f"further than before after {seconds(lost)}, of it {median(back or [0]) * STEP_S:.2f} s for "
        f"{median(back or [0]):.0f} steps trained again; {still / max(1, len(kills)):.2f} s a kill in which nothing new "
        f"was trained, with the way back to both ranks"
    )
    for entry in record.history:
        if any(word in entry.get("why", "") for word in ("differ", "could not", "left out")):
            print(f"  {entry['why']}")
    for who in ("leader", "follower"):
        if parts := _time_lines(folder, [kill for kill in kills if kill[1] == who]):
            between = [median(column) for column in zip(*parts, strict=True)]
            print(
                f"  {who}: {between[0]:.2f} s until the ranks have the cell again, {between[1]:.2f} s until it takes a "
                f"step, {between[2]:.2f} s until that is a new one; worst in all {max(map(sum, parts)):.2f} s"
            )
    return is_same and record.num_restarts == 0


def _is_same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    pairs = zip(found["losses"], wanted["losses"], strict=True)
    close = all(abs(a - b) <= 1e-9 * max(abs(a), abs(b), 1e-12) + 1e-12 for a, b in pairs)
    return close and found["whole"] and all(found[name] == wanted[name] for name in ("turn", "order", "whole"))


def _kill_until_it_ends(
    server: Server, folder: RunFolder, every_s: float, source: random.Random
) -> list[tuple[float, str]]:
    """The times of the kills, and whether the agent led the run or followed."""
    kills: list[tuple[float, str]] = []
    due = time.monotonic() + every_s
    until((folder.path / "run.json").exists, "the run begins", 60)
    while folder.read().is_active:
        time.sleep(0.2)  # the moment is the experiment
        if time.monotonic() < due:
            continue
        due = time.monotonic() + every_s
        holding = [agent for agent in server.agents() if agent.held]
        if not holding:
            continue
        agent = source.choice(holding)
        kills.append((time.time(), "leader" if agent.worlds else "follower"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(Path(agent.home).with_name("agent.json").read_text())["pid"], signal.SIGKILL)
    return kills


def _world_of(server: Server, world: Ranks) -> Ranks:
    """The world, where it is led now."""
    [leader] = [agent for agent in server.agents() if any(w["world_id"] == world.world_id for w in agent.worlds)]
    return world.beside(AgentElsewhere(leader.address))


def turns(folder: RunFolder) -> list[tuple[float, int]]:
    """When which step was told."""
    return [(row["t"], row["values"]["turn"]) for row in read_all(folder.metrics(0)) if "turn" in row.get("values", {})]


def gaps(folder: RunFolder) -> list[float]:
    """The times in which the run came no further than it had been, in seconds; a step's own time is not counted."""
    first: dict[int, float] = {}
    for at, turn in turns(folder):
        first.setdefault(turn, at)
    between = [later - earlier for earlier, later in pairwise(sorted(first.values()))]
    usual = median(between) if between else 0.0
    return [taken - usual for taken in between if taken > 10 * max(usual, STEP_S)]


def _time_lines(folder: RunFolder, kills: list[tuple[float, str]]) -> list[tuple[float, float, float]]:
    """Seconds from each kill until the cell is sent again, from then to its first step, and to the first new one."""
    rows, marks = turns(folder), [mark["t"] for mark in read_all(folder.marks) if mark["mark"] in ("resize", "restart")]
    found = []
    for at, _ in kills:
        before = max((turn for t, turn in rows if t <= at), default=0)
        new = next((t for t, turn in rows if t > at and turn > before), 0.0)
        sent = next((t for t in marks if at < t < new), None)
        first = next((t for t, _ in rows if sent is not None and t > sent), None)
        if sent is not None and first is not None:
            found.append((sent - at, first - sent, new - first))
    return found


def _lost(folder: RunFolder, kills: list[tuple[float, str]]) -> tuple[list[float], list[int]]:
    """Seconds from each kill until the run was further than ever before, and the steps that were trained again."""
    rows = turns(folder)
    lost, back = [], []
    for at, _ in kills:
        before = max((turn for t, turn in rows if t <= at), default=0)
        after = [t for t, turn in rows if t > at and turn > before]
        lost += [min(after) - at] if after else []
        back += [before - min(turn for t, turn in rows if t > at) + 1] if after else []
    return lost, back
