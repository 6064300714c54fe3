"""The loss that DDP reaches over a link of 100 Mbit/s, and how soon DiLoCo reaches it: two hosts, one rank on each.

Hosts are network namespaces; a token bucket (`tc qdisc ... tbf`) on both ends of each cable limits the rate. Takes root.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest

from tests.bench.measured import Row
from tests.support.clusters import Server
from tests.support.hosts import DaskOverHosts, Host, network
from tests.support.worlds import Ranks, until

RATE = "100mbit"
ROUNDS = 1  # of minutes
STEPS = 40  # of DDP
MOST_S = 600.0
EVERY = 20  # steps of DiLoCo's rounds
BODY = """
import time
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=4096, hidden_size=384, intermediate_size=768, num_hidden_layers=2,
                     num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=64)
model = LlamaForCausalLM(config)
num_parameters = sum(parameter.numel() for parameter in model.parameters())
generator = torch.Generator().manual_seed(1)
follows = torch.randint(0, 512, (512, 2), generator=generator)  # each token is followed by one of two

def texts(number):
    rows = torch.randint(0, 512, (number, 1), generator=generator)
    for _ in range(31):
        choice = torch.randint(0, 2, (number, 1), generator=generator)
        rows = torch.cat([rows, follows[rows[:, -1:]].gather(2, choice[:, :, None])[:, :, 0]], 1)
    return rows

rows, held_out = texts(16_000), texts(32)
accelerator = Accelerator()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=4))

def evaluated():
    with torch.no_grad():
        return model(input_ids=held_out, labels=held_out).loss.item()

evaluated()
torch.distributed.barrier()
began, curve = time.perf_counter(), []
for step, batch in enumerate(loader, 1):
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % every == 0:
        curve.append((time.perf_counter() - began, evaluated()))
        if curve[-1][1] <= wanted or step >= most:
            break
"""


def measure(folder: Path) -> list[Row]:
    """Both in turn; DDP trains so many steps, DiLoCo until it is as good on the same held-out text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCLOUD_ROOT", str(folder / "root"))
        patch.setenv("LLMCLOUD_RUNTIME_DIR", str(folder / "run"))
        try:
            with _world(folder) as world:
                times = [_both(world) for _ in range(ROUNDS)]
        except pytest.skip.Exception as skipped:
            return [Row("slow-link", "DiLoCo beside DDP over 100 Mbit/s", "s", "DDP", [0.0], missing=str(skipped))]
    ours, theirs = ([pair[at] for pair in times] for at in (0, 1))
    what = f"over {RATE}: seconds to the held-out loss of {STEPS} steps of DDP, 6 M parameters"
    return [Row("slow-link", what, "s", "DDP", ours, theirs, goal=0.25)]


def _both(world: Ranks) -> tuple[float, float]:
    ddp = _curve(world, "ddp", every=STEPS, most=STEPS, wanted=-1.0)
    seconds, loss = ddp[-1]
    diloco = _curve(world, f"diloco:{EVERY},bits=8", every=EVERY, most=20 * STEPS, wanted=loss)
    if diloco[-1][1] > loss:
        raise AssertionError(f"DiLoCo came to {diloco[-1][1]:.3f} only, DDP to {loss:.3f}")
    return diloco[-1][0], seconds


def _curve(world: Ranks, plan: str, **settings: Any) -> list[tuple[float, float]]:
    world.push(**settings)
    outcome = world.send(BODY, plan=plan).end(MOST_S)
    if outcome.state != "finished":
        raise AssertionError("\n".join(outcome.error["traceback"]))
    found: list[tuple[float, float]] = world.pull("curve")
    print(f"  {plan}: " + ", ".join(f"{seconds:.1f} s {loss:.3f}" for seconds, loss in found), flush=True)
    return found


@contextlib.contextmanager
def _world(folder: Path) -> Iterator[Ranks]:
    """One rank on each of two hosts whose cables are slow."""
    folder.mkdir(parents=True, exist_ok=True)
    environ = {"OMP_NUM_THREADS": "1"}
    with network("head", "one", "two") as (head, *nodes), dask.config.set({"distributed.worker.daemon": False}):
        cluster = DaskOverHosts(head, nodes, folder, environ, scheme="tcp")
        cluster.start()
        server = Server()
        try:
            server.do(server.pool.connect(cluster.address, "wide", 1))
            until(lambda: len(server.do(server.pool.agents())) == 2, "the workers are there", 60)
            world = server.world(2)
            for node in nodes:
                _limit(node)
            yield world
            world.end()
        finally:
            server.end()


def _limit(host: Host) -> None:
    """So much can leave the host, and come to it, each second."""
    bucket = ["root", "tbf", "rate", RATE, "burst", "64kb", "latency", "100ms"]
    for command in (
        ["ip", "netns", "exec", host.name, "tc", "qdisc", "add", "dev", host.interface, *bucket],
        ["tc", "qdisc", "add", "dev", host.cable, *bucket],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
