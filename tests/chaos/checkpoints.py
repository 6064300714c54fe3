"""Kills during a checkpoint, and kills of ranks: does the newest always load, are the final weights the same?"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from jupyter_llmcloud.storage.checkpoints import CheckpointFolder, seal
from tests.chaos.figures import counts, seconds
from tests.support.resuming import CELLS, cell, results, resumed, same
from tests.support.worlds import AgentProcess, Ranks

FILE_SIZE = 1 << 20
STALL = """
import time, torch
from torch.nn.parallel import DistributedDataParallel
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(20)]))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
asynchronous, synchronous = [], []
for step in run.steps(12):
    optimizer.zero_grad()
    model(torch.randn(4, 1024)).square().mean().backward()
    optimizer.step()
    run.checkpoint()
checkpoints, save = run.checkpoints, run.checkpoints.save
wait = checkpoints._writer.wait

def timed(*where):
    wait()
    began = time.perf_counter()
    saved = save(*where)
    asynchronous.append(time.perf_counter() - began)
    wait()
    synchronous.append(time.perf_counter() - began)
    return saved

checkpoints.save = timed
for step in run.steps(8):
    optimizer.zero_grad()
    model(torch.randn(4, 1024)).square().mean().backward()
    optimizer.step()
    run.checkpoint()
checkpoints.save = save
stall = asynchronous, synchronous
"""


def main(kills: int = 200, rank_kills: int = 50, seed: int = 0) -> bool:
    """Print the counts and times; returns whether every promise held."""
    source = random.Random(seed)
    held = _kill_writers(kills, source)
    agent = AgentProcess()
    try:
        held = _measure_stall(agent) and held
        return _kill_ranks(agent, rank_kills, source) and held
    finally:
        agent.end()


def _kill_writers(kills: int, source: random.Random) -> bool:
    """SIGKILL a process at a random moment of saving one checkpoint after another."""
    with tempfile.TemporaryDirectory(prefix="llmc-") as name:
        folder = CheckpointFolder(Path(name))
        _save(folder, 0)
        unloadable, moments, times = 0, Counter[str](), []
        for number in range(kills):
            pid = os.fork()
            if pid == 0:
                _save_for_ever(folder, number)
            time.sleep(source.uniform(0.001, 0.06))  # the moment is the experiment
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            began = time.monotonic()
            found, words = folder.newest()
            times.append(time.monotonic() - began)
            unloadable += found is None or bool(words)
            left = {path.name.rsplit(".", 1)[-1] for path in folder.path.iterdir() if path.name.startswith(".")}
            moments["while writing" if "staging" in left else "while deleting" if "gone" in left else "between"] += 1
            folder.sweep()
    print(
        f"kills during a checkpoint: {kills} ({counts(moments)}); newest not loadable {unloadable}; "
        f"found and verified after {seconds(times)}"
    )
    return unloadable == 0


def _save(folder: CheckpointFolder, step: int) -> None:
    staging = folder.staging(step, 0)
    sealed = {}
    for name in ("model.safetensors", "shared.pt", "rank-0000.pt"):
        (staging / name).write_bytes(os.urandom(FILE_SIZE))
        sealed[name] = seal(staging / name)
    folder.commit(staging, step, sealed)
    folder.retain(2)


def _save_for_ever(folder: CheckpointFolder, number: int) -> None:
    newest, _ = folder.newest()
    step = newest.step if newest else 0
    try:
        while True:
            step += 1
            _save(folder, step)
    finally:
        os._exit(1)


def _measure_stall(agent: AgentProcess) -> bool:
    world = Ranks(agent)
    try:
        outcome = world.send(STALL).end(600)  # it writes five gigabytes
        assert outcome.state == "finished", outcome.report
        asynchronous, synchronous = world.pull("stall")
    finally:
        world.end()
    waits, whole = statistics.median(asynchronous), statistics.median(synchronous)
    print(
        f"stall of a checkpoint, 21 M parameters with AdamW: {waits * 1e3:.0f} ms, "
        f"{waits / whole:.1%} of a synchronous save ({whole * 1e3:.0f} ms)"
    )
    return waits < 0.1 * whole


def _kill_ranks(agent: AgentProcess, kills: int, source: random.Random) -> bool:
    """SIGKILL rank 1 in a random turn of a cell of a random kind; compare everything with an undisturbed run."""
    names = [name for name in CELLS if name not in ("workers", "dispatched", "stream")]
    world, wanted = Ranks(agent), {}
    times, ends, wrong = [], Counter[str](), 0
    try:
        for name in names:
            world.ok(cell(name))
            wanted[name] = results(world)
        for _ in range(kills):
            name, turn = source.choice(names), source.randint(2, 34)
            outcome = world.run(cell(name, turn), checkpoint_every=source.randint(1, 5), max_restarts=3)
            equal = outcome.state == "finished" and all(map(same, wanted[name], results(world)))
            wrong += not equal
            if not equal:
                print(f"  {name}, killed in turn {turn}: {outcome.state}, {resumed(outcome)}")
            ends[_how(resumed(outcome))] += 1
            times += _pause(outcome.metrics)
    finally:
        world.end()
    print(
        f"rank kills: {kills} ({counts(ends)}); final state not the same to the last bit {wrong}; "
        f"training again after {seconds(times)}"
    )
    return wrong == 0


def _how(notes: list[str]) -> str:
    if len(notes) > 1:
        return "restarted more than once"
    return "resumed" if notes and re.search(r"resumed from step", notes[0]) else "from the start"


def _pause(metrics: list[tuple[int, dict]]) -> list[float]:
    """The longest time between two records of rank 0, if the cell logs any."""
    moments = [record["t"] for rank, record in metrics if rank == 0]
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    return [max(gaps)] if gaps else []


if __name__ == "__main__":
    import sys

    sys.exit(0 if main() else 1)
