"""Cells that train, die once at a chosen place, and tell what came of it. For tests and chaos."""

from __future__ import annotations

import textwrap
from typing import Any

import torch

from tests.support.worlds import Outcome, Ranks

COMMON = """
import collections, hashlib, os, random, signal, time
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from accelerate import Accelerator
from accelerate.utils import set_seed
set_seed(7)

class Noisy(Dataset):
    def __init__(self): self.x, self.y = torch.randn(96, 8), torch.randn(96, 1)
    def __len__(self): return 96
    def __getitem__(self, i): return i, self.x[i] + 0.1 * torch.randn(8) + random.random(), self.y[i] + np.random.rand()

def net():
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1))

def perhaps_die(turn, victim=1):
    once = run.folder / "died"
    if turn == DIE and rank == victim and not once.exists():
        once.touch()
        deadline = time.monotonic() + 20
        while turn > 20 and not any((run.folder / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.01)  # on a busy machine the first one may still be being written
        os.kill(os.getpid(), signal.SIGKILL)

def tell(model, samples, *more):
    global result
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = {"weights": state, "samples": samples, "more": more, "next": torch.rand(1).item()}
"""

# Everything an ordinary Accelerate script does: accumulation, clipping, a schedule, dropout, evaluation, counters.
ACCELERATE = """
accelerator = Accelerator(gradient_accumulation_steps=2)
model = net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
loader, held_out = DataLoader(Noisy(), batch_size=BATCH, shuffle=True), DataLoader(Noisy(), batch_size=8)
model, optimizer, loader, held_out, scheduler = accelerator.prepare(model, optimizer, loader, held_out, scheduler)
turn, total, samples = 0, torch.zeros(()), []
for epoch in range(3):
    model.train()
    for step, (i, x, y) in enumerate(loader):
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        turn += 1
        total += loss.detach()
        samples.append((epoch, step, i.tolist()))
        accelerator.log({"loss": loss.item()}, step=turn)
        perhaps_die(turn)
    model.eval()
    print("epoch", epoch, "accuracy", sum(len(y) for _, x, y in held_out) / sum(1 for _ in held_out))
tell(accelerator.unwrap_model(model), samples, turn, float(total), scheduler.get_last_lr())
"""

# The same loop inside functions, with a step limit that counts in a local variable.
FUNCTIONS = """
def train_epoch(epoch, model, optimizer, loader, seen, samples):
    losses = []
    for i, x, y in loader:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        samples.append((epoch, i.tolist()))
        perhaps_die(seen + len(losses))
    return losses

def main():
    accelerator = Accelerator()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    loader = accelerator.prepare(DataLoader(Noisy(), batch_size=BATCH, shuffle=True))
    model, optimizer = accelerator.prepare(model, optimizer)
    seen, best, samples, epoch = 0, float("inf"), [], 0
    while seen < 40:
        losses = train_epoch(epoch, model, optimizer, loader, seen, samples)
        seen += len(losses)
        best = min(best, *losses)
        epoch += 1
    tell(accelerator.unwrap_model(model), samples, seen, best)

main()
"""

# No Accelerator: DistributedDataParallel, a sampler that is told the epoch, an endless iterator beside a range.
PLAIN_TORCH = """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler
model = DistributedDataParallel(net())
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)
data = Noisy()
loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, shuffle=True))
generator = np.random.default_rng(3)

def forever():
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            yield batch
        epoch += 1

batches, samples, drawn = forever(), [], 0.0
for turn in range(1, 41):
    i, x, y = next(batches)
    drawn += generator.random()
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    scheduler.step()
    samples.append((turn, i.tolist()))
    perhaps_die(turn)
tell(model.module, samples, turn, drawn, scheduler.get_last_lr())
"""

# Batches drawn by hand, counted by run.steps.
STEPS = """
from torch.nn.parallel import DistributedDataParallel
model = DistributedDataParallel(net())
weight = nn.Parameter(torch.ones(()))
optimizer = torch.optim.AdamW([*model.parameters(), weight], lr=1e-2)
data, samples = torch.randn(500, 8), []
for step in run.steps(40):
    rows = torch.randint(500, (BATCH,))
    loss = (weight * model(data[rows]) - data[rows].sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    samples.append((step, rows.tolist()))
    run.log(loss=loss, step=step)
    perhaps_die(step + 1)
tell(model.module, samples, step, weight.item())
"""

# Samples made by worker processes.
WORKERS = ACCELERATE.replace("batch_size=BATCH, shuffle=True", "batch_size=BATCH, shuffle=True, num_workers=1")

# Batches read by one rank for all; and samples without an index, made as they are asked for.
DISPATCHED = ACCELERATE.replace(
    "Accelerator(gradient_accumulation_steps=2)",
    "Accelerator(gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))",
).replace("DataLoader(Noisy(), batch_size=BATCH", "DataLoader(Quiet(), batch_size=BATCH")
DISPATCHED = (
    """
from accelerate.utils import DataLoaderConfiguration

class Quiet(Noisy):
    def __getitem__(self, i): return i, self.x[i], self.y[i]
"""
    + DISPATCHED
)
STREAM = """
from torch.utils.data import IterableDataset

class Stream(IterableDataset):
    def __iter__(self):
        source = torch.Generator().manual_seed(5)
        for i in range(96):
            yield i, torch.randn(8, generator=source), torch.randn(1, generator=source)
""" + ACCELERATE.replace(
    "DataLoader(Noisy(), batch_size=BATCH, shuffle=True)", "DataLoader(Stream(), batch_size=BATCH)"
)

TRAINER_ROWS = """
import tempfile
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

class Rows(Noisy):
    def __getitem__(self, i):
        i, x, y = super().__getitem__(i)
        return {"i": i, "x": x, "labels": y.float()}

"""
# transformers' Trainer with what its users add: an own loss, callbacks, evaluations, checkpoints of its own.
TRAINER = (
    TRAINER_ROWS
    + """class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = net()

    def forward(self, x, labels=None, i=None):
        out = self.layers(x)
        return {"loss": nn.functional.mse_loss(out, labels), "logits": out}

class Own(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.samples, self.kept = [], {"train": collections.defaultdict(list)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self.samples.append(inputs["i"].tolist())
        outputs = model(**inputs)
        loss = outputs["loss"] + 1e-3 * sum(p.square().sum() for p in model.parameters())
        if model.training:
            self.kept["train"]["loss"].append(loss.item())
        return (loss, outputs) if return_outputs else loss

class Watch(TrainerCallback):
    def __init__(self):
        self.seen, self.average = [], None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append((state.global_step, round(state.epoch, 6)))
        if self.average is None:
            self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            self.average[name] = 0.9 * self.average[name] + 0.1 * p.detach()
        perhaps_die(state.global_step)

def clean(logs):
    return {k: v for k, v in logs.items() if "runtime" not in k and "per_second" not in k}

def fit(model, seed, epochs, **more):
    folder = tempfile.mkdtemp()
    arguments = TrainingArguments(folder, num_train_epochs=epochs, per_device_train_batch_size=BATCH, seed=seed,
        learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=5, gradient_accumulation_steps=2, logging_steps=5,
        eval_strategy="steps", eval_steps=3, save_steps=7, save_total_limit=2, save_only_model=True,
        remove_unused_columns=False, use_cpu=True, report_to=[], disable_tqdm=True, **more)
    watch = Watch()
    return Own(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[watch]), watch

first, _ = fit(Net(), 3, 1, max_steps=2)
first.train()
before = first.evaluate()["eval_loss"]
teacher = first.model.layers
trainer, watch = fit(Net(), 5, 6)
output = trainer.train()
after = clean(trainer.evaluate())
tell(trainer.model, trainer.samples, trainer.kept, watch.seen, before, after, output.training_loss,
     [clean(logs) for logs in trainer.state.log_history], trainer.lr_scheduler.get_last_lr(), trainer.state.global_step,
     {name: p.tolist() for name, p in watch.average.items()}, [p.tolist() for p in teacher.parameters()])
"""
)

CELLS = {
    "accelerate": ACCELERATE,
    "functions": FUNCTIONS,
    "plain torch": PLAIN_TORCH,
    "run.steps": STEPS,
    "workers": WORKERS,
    "dispatched": DISPATCHED,
    "stream": STREAM,
    "trainer": TRAINER,
}


def cell(name: str, die: int = 0, batch: int = 4) -> str:
    """The code of a cell, by name or as it is, that kills rank 1 in its turn `die` (0: never)."""
    return f"DIE, BATCH = {die}, {batch}\n{COMMON}\n{textwrap.dedent(CELLS.get(name, name))}"


def dies_before(code: str, turn: int) -> str:
    """The same, which kills the rank in an earlier turn too."""
    again = code.replace('once = run.folder / "died"', 'once = run.folder / f"died-{turn}"')
    return again.replace("if turn == DIE", f"if turn in ({turn}, DIE)")


def results(world: Ranks) -> list[dict[str, Any]]:
    """What the cell told, on every rank."""
    return [world.pull("result", rank) for rank in range(world.size)]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal to the last bit: weights, samples in their order, counters, the next random number."""
    return (
        one["weights"].keys() == other["weights"].keys()
        and all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
        and (one["samples"], one["more"], one["next"]) == (other["samples"], other["more"], other["next"])
    )


def notes(outcome: Outcome) -> list[str]:
    """What was said beside the ranks' own output."""
    return [state.detail for state in outcome.states if state.state == "note"]


def resumed(outcome: Outcome) -> list[str]:
    """The notes that say how a run went on."""
    return [note for note in notes(outcome) if "(restart " in note]
