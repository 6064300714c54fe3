"""A long healthy training with everything slow that belongs to one: does anybody cry wolf?

Two ranks train in DDP with a cell of its own for each round: uneven data loading, evaluation on all ranks and on one,
checkpoints on all ranks and on one, with workers of a DataLoader and without, jittering steps. Every report is a false
alarm. A last cell then hangs for real, to show that the watch was awake.
"""

from __future__ import annotations

import random
import time

from tests.support.worlds import AgentProcess, Ranks, Running

SETUP = """
import os, random, tempfile, time, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
source = random.Random(rank)
core = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1))
model = DistributedDataParallel(core)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
folder = tempfile.mkdtemp()

class Slow(torch.utils.data.Dataset):
    def __init__(self, number, delay_s): self.number, self.delay_s = number, delay_s
    def __len__(self): return self.number
    def __getitem__(self, index):
        time.sleep(source.expovariate(1 / self.delay_s) if self.delay_s else 0)
        return torch.randn(64), torch.randn(1)

def train(number, delay_s=0.0, workers=0):
    for x, y in torch.utils.data.DataLoader(Slow(number, delay_s), batch_size=8, num_workers=workers):
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(source.uniform(0, 0.02))

def work(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        core(torch.randn(256, 64)).sum().item()
        time.sleep(0.05)

def evaluate(seconds):
    core.eval()
    with torch.no_grad():
        work(seconds)
    core.train()

def save_checkpoint(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        torch.save(core.state_dict(), os.path.join(folder, "weights.pt"))
        time.sleep(0.05)
"""

ROUNDS = {
    "training": "train(2000)",
    "jittering data": "train(1200, delay_s=0.004)",
    "workers of a loader": "train(1200, delay_s=0.01, workers=1)",
    "slow data on one rank": "train(240, delay_s=0.05 if rank else 0.0)",
    "slow data everywhere": "time.sleep(30); dist.barrier()",
    "evaluation everywhere": "train(400); evaluate(25); dist.barrier()",
    "evaluation on one rank": "train(400)\nif rank == 0: evaluate(25)\ndist.barrier()",
    "evaluation in the cell": "core.eval()\nif rank == 0:\n    with torch.no_grad(): work(20)\ndist.barrier()",
    "checkpoint on one rank": "train(400)\nif rank == 0: save_checkpoint(20)\ndist.barrier()",
    "checkpoint everywhere": "save_checkpoint(15 + 8 * rank); dist.barrier()",
    "a rank that is slow": "for _ in range(5):\n    time.sleep(6 * rank)\n    dist.all_reduce(torch.ones(1000))",
    "a big collective": "for _ in range(20): dist.all_reduce(torch.ones(2_000_000))",
    "only one rank": "if rank == 1: work(15)",
}


def main(minutes: float = 30, seed: int = 0) -> bool:
    """Print the counts; returns whether no healthy round raised an alarm and the real hang did."""
    source = random.Random(seed)
    agent = AgentProcess()
    world = Ranks(agent)
    rounds, alarms = 0, []
    until = time.monotonic() + 60 * minutes
    try:
        world.ok(SETUP)
        while time.monotonic() < until:
            for name in source.sample([*ROUNDS], len(ROUNDS)):
                if time.monotonic() < until:
                    outcome = world.send(ROUNDS[name]).end(600)
                    rounds += 1
                    alarms += [f"{name}: {record['text']}" for _, record in outcome.logs if record["kind"] == "report"]
                    if outcome.state != "finished":
                        alarms.append(f"{name}: {outcome.report}")
        found_s = _hang(world.send("if rank == 1: time.sleep(1000)\ndist.barrier()"))
    finally:
        world.end()
        agent.end()
    print(f"soak: {minutes:g} min, {rounds} healthy cells, {len(alarms)} false alarms; a hang named in {found_s:.1f} s")
    print("".join(f"  {alarm}\n" for alarm in alarms), end="", flush=True)
    return not alarms and found_s < 15


def _hang(running: Running) -> float:
    deadline = time.monotonic() + 60
    while not any(record["kind"] == "report" for _, record in running.outcome.logs):
        running._take(deadline, "the hang is reported")
    found_s = time.monotonic() - running.began
    running.stop().end()
    return found_s
