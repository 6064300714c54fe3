"""Train the quickstart's model for a while on random tokens; tell the seconds of each step, and who used the CPU.

Then the same loop round a model that is next to nothing, where what surrounds the model can be seen.

Every rank tells what its own threads, and the processes around it, have used from step WARM_UP on.
"""

import json
import os
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

NUM_STEPS, WARM_UP, BATCH, LENGTH, VOCABULARY = 40, 8, 8, 128, 2048
NUM_SMALL = 300


def of_threads(pid):
    """Seconds of CPU that each thread of a process has used."""
    used = {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            used[int(path.parent.name)] = int(path.read_text().split()[0]) / 1e9
        except OSError:
            pass  # the thread has just ended
    return used


def family():
    """{pid: command line} of the processes started for this contender: their commands name it, or a parent's does."""
    commands, children = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            pid, parent = int(path.name), int((path / "stat").read_text().rpartition(")")[2].split()[1])
            commands[pid] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has just ended
        children.setdefault(parent, []).append(pid)
    found, asked = {}, [pid for pid, command in commands.items() if os.environ["BENCH_FAMILY"] in command]
    while asked:
        pid = asked.pop()
        found[pid] = commands[pid]
        asked += children.get(pid, [])
    return found


def used_cpu():
    return {"threads": of_threads(os.getpid()), "family": {pid: sum(of_threads(pid).values()) for pid in relatives}}


accelerator = Accelerator()
set_seed(0)
config = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer = accelerator.prepare(model, optimizer)
tokens = torch.randint(VOCABULARY, (NUM_STEPS, BATCH, LENGTH))


def train_step(step, model, optimizer, loss):
    """From the loss on; the seconds of the main thread that it took."""
    cpu_start = time.thread_time()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.log({"loss": loss.item()}, step=step)
    accelerator.print(f"step {step}: loss {loss.item():.4f}")
    return time.thread_time() - cpu_start


relatives = family() if accelerator.is_main_process else {}
seconds, cpu_seconds = [], []
for step, batch in enumerate(tokens):
    if step == WARM_UP:
        began, before = time.perf_counter(), used_cpu()
    start, cpu_start = time.perf_counter(), time.thread_time()
    mine = batch[accelerator.process_index :: accelerator.num_processes]
    loss = model(input_ids=mine, labels=mine).loss
    train_step(step, model, optimizer, loss)
    seconds.append(time.perf_counter() - start)
    cpu_seconds.append(time.thread_time() - cpu_start)
wall, after = time.perf_counter() - began, used_cpu()

small = torch.nn.Linear(8, 8)
small, small_optimizer = accelerator.prepare(small, torch.optim.SGD(small.parameters(), lr=1e-3))
inputs = torch.ones(1, 8)
small_cpu_seconds = [
    train_step(NUM_STEPS + step, small, small_optimizer, small(inputs).square().mean()) for step in range(NUM_SMALL)
]

report = {
    "tokens_per_step": BATCH * LENGTH,
    "warm_up": WARM_UP,
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
    "small_cpu_seconds": small_cpu_seconds,
    "loss": loss.item(),
    "wall": wall,
    "pid": os.getpid(),
    "names": {thread.native_id: thread.name for thread in threading.enumerate()},
    "commands": relatives,
    "before": before,
    "after": after,
}
folder = Path(os.environ.get("BENCH_FOLDER") or BENCH_FOLDER)  # noqa: F821  (a cell gets it by --push)
(folder / f"report-{accelerator.process_index}.json").write_text(json.dumps(report))
accelerator.wait_for_everyone()
