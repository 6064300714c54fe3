"""A hundred Stops at random moments of cells of many kinds: is the prompt back, are the variables kept?"""

from __future__ import annotations

import random
import time
from collections import Counter

from tests.chaos.figures import counts, seconds
from tests.worlds import AgentProcess, Ranks

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
    "subprocess": "!sleep 1000",
}


def main(stops: int = 100, seed: int = 0) -> bool:
    """Print the counts and times; returns whether every promise held."""
    source = random.Random(seed)
    agent = AgentProcess()
    world = Ranks(agent)
    times: list[float] = []
    ends: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    try:
        world.ok(SETUP)
        for _ in range(stops):
            name = source.choice(list(CELLS))
            running = world.send(CELLS[name])
            time.sleep(source.uniform(0.0, 1.5))  # the moment is the experiment
            outcome = running.stop().end(30)
            times.append(outcome.seconds)
            ends[outcome.state] += 1
            after = world.run(
                "assert kept == rank + 1\nt = torch.ones(1)\ndist.all_reduce(t)\nassert t.item() == world_size"
            )
            if after.state != "finished":
                lost[name] += 1
                print(f"  {name}: {outcome.seconds:.2f} s, {outcome.report}; then {after.error['evalue'][:300]}")
                world.ok(SETUP)
    finally:
        world.end()
        agent.end()
    kept = stops - sum(lost.values())
    print(
        f"stops: {stops}, {counts(ends)}; back after {seconds(times)}; variables kept {kept} of {stops} {dict(lost) or ''}"
    )
    return max(times) < 8 and kept == stops
