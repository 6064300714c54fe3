"""A hundred Stops at random moments of cells of many kinds, and between cells: is the prompt back, is all kept?"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter, defaultdict

from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.protocol.agent_messages import StopRun
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from tests.chaos.figures import counts, seconds
from tests.support.worlds import AgentProcess, Outcome, Ranks

SETUP = """
import time, torch, torch.distributed as dist
from accelerate import Accelerator
accelerator = Accelerator()
torch.manual_seed(0)
kept = rank + 1
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = torch.utils.data.TensorDataset(torch.randn(4096, 64), torch.randn(4096, 1))
loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
"""
TRAIN = """
while True:
    for x, y in loader:
        loss = ((model(x) - y) ** 2).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        {extra}
"""
# A model whose checkpoints take long enough that most Stops come while one is being written.
BIG = """
big = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(6)]))
trainer = torch.optim.AdamW(big.parameters(), lr=1e-4)
for step in run.steps(10**6):
    big(torch.randn(4, 1024)).square().mean().backward()
    trainer.step()
    trainer.zero_grad()
    {extra}
"""
CELLS = {
    "training": TRAIN.format(extra="pass"),
    "slow steps": TRAIN.format(extra="time.sleep(0.4)"),
    "logging": TRAIN.format(extra="accelerator.log({'loss': loss.item()}); print(loss.item())"),
    "python": "i = 0\nwhile True: i += 1",
    "sleep": "time.sleep(1000)",
    "collectives": "while True: dist.all_reduce(torch.ones(1000))",
    "absent peer": "if rank == 0: time.sleep(1000)\ndist.all_reduce(torch.ones(10))",
    "backward without a peer": "x, y = next(iter(loader))\nif rank == 1: time.sleep(1000)\n"
    "accelerator.backward(((model(x) - y) ** 2).mean())",
    "data loading": "slow = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2)\n"
    "while True:\n    for batch in slow: pass",
    "saving": "while True: torch.save(model.state_dict(), f'/dev/shm/llmcloud-chaos-{rank}.pt')",
    "checkpoint every step": BIG.format(extra="pass"),
    "run.checkpoint": BIG.format(extra="run.checkpoint()"),
    "subprocess": "!sleep 1000",
    "between cells": "brief = 1",
    "idle": "",
}
CHECK = "assert kept == rank + 1\nt = torch.ones(1)\ndist.all_reduce(t)\nassert t.item() == world_size"


def main(stops: int = 100, seed: int = 0) -> bool:
    """Print the counts and times; returns whether every promise held."""
    source = random.Random(seed)
    agent = AgentProcess()
    world = Ranks(agent)
    times: dict[str, list[float]] = defaultdict(list)
    ends: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    corrupt = 0
    try:
        last = world.ok(SETUP)
        names = [name for _ in range(stops // len(CELLS) + 1) for name in source.sample([*CELLS], len(CELLS))][:stops]
        for name in names:
            seconds_taken, outcome = _stop(world, name, source, last)
            times[name].append(seconds_taken)
            ends[outcome.state if name != "idle" else "nothing to stop"] += 1
            if "checkpoint" in name and (path := outcome.folder.path / "checkpoints").is_dir():
                corrupt += bool(CheckpointFolder(path).newest()[1])
            last = world.run(CHECK)
            if last.state != "finished":
                lost[name] += 1
                print(f"  {name}: {seconds_taken:.2f} s, {outcome.report}; then {last.error['evalue'][:300]}")
                last = world.ok(SETUP)
    finally:
        world.end()
        agent.end()
        for rank in (0, 1):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/dev/shm/llmcloud-chaos-{rank}.pt")
    every = [value for row in times.values() for value in row]
    kept = stops - sum(lost.values())
    print(f"stops: {stops}, {counts(ends)}; back after {seconds(every)}; variables kept {kept} of {stops}; ", end="")
    print(f"checkpoints that do not load {corrupt} {dict(lost) or ''}")
    for name in CELLS:
        if times[name]:
            print(f"  {name}: {len(times[name])}, {seconds(times[name])}")
    return max(every) < 8 and kept == stops and not corrupt


def _stop(world: Ranks, name: str, source: random.Random, last: Outcome) -> tuple[float, Outcome]:
    """Press Stop at a random moment of the cell; how long until the prompt was back, and how the cell ended."""
    if name == "idle":
        return _stop_nothing(world, last), last
    options = {"checkpoint_every": 1} if name == "checkpoint every step" else {}
    running = world.send(CELLS[name], **options)
    brief = name == "between cells"
    time.sleep(source.uniform(0.0, 0.01 if brief else 1.5))  # the moment is the experiment
    began = time.monotonic()
    with contextlib.suppress(NotFound):  # it had just ended
        running.stop()
    outcome = running.end(30)
    return time.monotonic() - began, outcome


def _stop_nothing(world: Ranks, last: Outcome) -> float:
    """A Stop that comes when nothing runs, also as a signal to the ranks themselves."""
    began = time.monotonic()
    other = world.beside()
    with contextlib.suppress(NotFound):
        other.channel.request(StopRun(run_id=last.ended.run_id))
        raise AssertionError(f"{last.ended.run_id} was stopped after its end")
    for pid in other.pids():
        os.kill(pid, signal.SIGINT)
    other.channel.close()
    return time.monotonic() - began
