"""More cells that die once (see `resuming`): the shapes in which people write loops, and what they keep beside a model."""

from __future__ import annotations

from tests.support.resuming import TRAINER_ROWS

# --- shapes of loops -------------------------------------------------------------------------------------------------

BEGIN = """
accelerator = Accelerator()
model, data = net(), Noisy()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=BATCH, shuffle=True))
samples, turn = [], 0

def train(batch):
    i, x, y = batch
    loss = nn.functional.mse_loss(model(x), y)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    samples.append(i.tolist())
    return loss
"""
END = """
tell(accelerator.unwrap_model(model), samples, turn)
"""

WHILE_NEXT = (
    BEGIN
    + """
batches = iter(loader)
while turn < 40:
    try:
        batch = next(batches)
    except StopIteration:
        batches = iter(loader)
        batch = next(batches)
    train(batch)
    turn += 1
    perhaps_die(turn)
"""
    + END
)

# A rate is looked for by steps that are taken back, and the gradient of the last one is added to that of the first step.
PROBED = (
    BEGIN
    + """
def find_rate():
    inner = accelerator.unwrap_model(model)
    start = {name: value.clone() for name, value in inner.state_dict().items()}
    probe = torch.optim.SGD(inner.parameters(), lr=1e-3)
    for at, (_, x, y) in zip(range(3), loader):
        probe.zero_grad()
        nn.functional.mse_loss(inner(x), y).backward()
        probe.step()
    inner.load_state_dict(start)

find_rate()
for epoch in range(4):
    for batch in loader:
        turn += 1
        train(batch)
        perhaps_die(turn)
"""
    + END
)

FOR_NEXT = (
    BEGIN
    + """
def endless():
    while True:
        yield from loader

batches = endless()
peeked = next(batches)[0].tolist()
for turn in range(1, 41):
    train(next(batches))
    perhaps_die(turn)
samples.append(peeked)
"""
    + END
)

# Epochs of so many steps, each with an iterator of its own: the last step that is saved is that of an epoch.
COUNTED = (
    BEGIN
    + """
for epoch in range(6):
    batches = iter(loader)
    for step in range(7):
        train(next(batches))
        turn += 1
        perhaps_die(turn)
"""
    + END
)

BREAK = (
    BEGIN
    + """
from tqdm.auto import tqdm
for epoch in range(9):
    for step, batch in enumerate(tqdm(loader, disable=False)):
        loss = train(batch)
        turn += 1
        perhaps_die(turn)
        if step == 6 or turn == 40:
            break
    if turn == 40:
        break
"""
    + END
)

SKIPPED = (
    BEGIN
    + """
for epoch in range(4):
    used = accelerator.skip_first_batches(loader, 3) if epoch == 0 else loader
    if epoch:
        loader.set_epoch(epoch)
    for batch in used:
        train(batch)
        turn += 1
        perhaps_die(turn)
"""
    + END
)

# A loop and its state in a class of the notebook, started by one line.
CLASS = """
class Meter:
    def __init__(self): self.total, self.num, self.history = 0.0, 0, []
    def update(self, value): self.total, self.num = self.total + value, self.num + 1; self.history.append(value)

class Ema:
    def __init__(self, model): self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
    def update(self, model):
        for name, p in model.named_parameters():
            self.shadow[name].data.mul_(0.9).add_(p.detach(), alpha=0.1)

class Fitter:
    def __init__(self, num_epochs):
        self.accelerator = Accelerator()
        self.net, self.ema, self.meters = net(), None, {"loss": Meter()}
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-2, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, 0.9)
        self.loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True)
        self.net, self.optimizer, self.loader = self.accelerator.prepare(self.net, self.optimizer, self.loader)
        self.ema, self.average = Ema(self.net), torch.optim.swa_utils.AveragedModel(self.net.module)
        self.turn, self.samples, self.best, self.best_state, self.num_epochs = 0, [], float("inf"), None, num_epochs

    def fit(self):
        for self.epoch in range(self.num_epochs):
            for batch in self.loader:
                self.step(batch)

    def step(self, batch):
        i, x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.ema.update(self.net)
        self.average.update_parameters(self.net.module)
        self.meters["loss"].update(loss.item())
        self.samples.append((self.epoch, i.tolist()))
        self.turn += 1
        if loss < self.best:
            self.best, self.best_state = loss.item(), {k: v.clone() for k, v in self.net.state_dict().items()}
        perhaps_die(self.turn)

fitter = Fitter(4)
fitter.fit()
tell(fitter.net.module, fitter.samples, vars(fitter.meters["loss"]), fitter.best, fitter.scheduler.get_last_lr(),
     {k: v.tolist() for k, v in fitter.best_state.items()}, {k: v.tolist() for k, v in fitter.ema.shadow.items()},
     {k: v.tolist() for k, v in fitter.average.state_dict().items()})
"""

# The loop in a module beside the notebook.
MODULE = """
import sys, tempfile, pathlib, importlib
folder = run.folder / f"code-{rank}"
folder.mkdir(exist_ok=True)
name = f"lab_{run.id.replace('-', '_')}"
(folder / f"{name}.py").write_text('''
import torch
from torch import nn

def evaluate(model, loader):
    total = 0.0
    with torch.no_grad():
        for i, x, y in loader:
            total += float(nn.functional.mse_loss(model(x), y))
    return total

def fit(accelerator, model, optimizer, loader, num_epochs, perhaps_die):
    samples, turn, total, scores = [], 0, 0.0, []
    for epoch in range(num_epochs):
        model.train()
        for i, x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            samples.append((epoch, i.tolist()))
            turn, total = turn + 1, total + loss.item()
            perhaps_die(turn)
        model.eval()
        scores.append(evaluate(model, loader))
    return samples, turn, total, scores
''')
sys.path.insert(0, str(folder))
lab = importlib.import_module(name)
accelerator = Accelerator()
model = net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
tell(accelerator.unwrap_model(model), *lab.fit(accelerator, model, optimizer, loader, 3, perhaps_die))
"""

# Everything is made anew for each fold.
FOLDS = """
scores, samples, turn = [], [], 0
for fold in range(4):
    data = Noisy()
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    accelerator, model = Accelerator(), net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(1):
        for i, x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            turn += 1
            samples.append(i.tolist())
            perhaps_die(turn)
    scores.append(sum(p.sum().item() for p in model.parameters()))
tell(accelerator.unwrap_model(model), samples, turn, scores)
"""

# One Accelerator prepares for each fold; a checkpoint is due at the end of an epoch, after which its last loss is read;
# the schedule asks how long a loader is that is another one later.
PREPARED_FOLDS = """
from torch.utils.data import Subset

def cross_validate():
    accelerator, data, losses, samples, turn = Accelerator(), Noisy(), [], [], 0
    for fold in range(3):
        model, rows = net(), [i for i in range(96) if i % 3 == fold]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = DataLoader(Subset(data, rows), batch_size=BATCH, shuffle=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / len(loader)))
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        for epoch in range(5):
            if epoch == 1:
                table, first = {"rows": rows}, loss.item()
                accelerator.gradient_accumulation_steps = 2
            for i, x, y in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.mse_loss(model(x), y)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                turn += 1
                samples.append(i.tolist())
                perhaps_die(turn)
            losses.append(loss.item())
        losses += [first, *table["rows"]]
    return accelerator.unwrap_model(model), samples, losses

tell(*cross_validate())
"""

# Batches that nobody follows, of which the first step is the first that is seen.
UNFOLLOWED = """
accelerator, samples, turn, losses = Accelerator(), [], 0, []
model, data = net(), Noisy()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer = accelerator.prepare(model, optimizer)
@torch.compile(backend="eager")  # which puts names of its own among those of the cell
def error(out, y):
    return nn.functional.mse_loss(out, y)

def train():
    turn = 0
    for epoch in range(12):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(epoch)).tolist()[rank :: world_size]
        for rows in [order[at : at + 12] for at in range(0, 48, 12)]:
            loss = error(model(data.x[rows]), data.y[rows])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            turn += 1
            samples.append(rows)
            perhaps_die(turn)
        losses.append(loss.item())
train()
tell(accelerator.unwrap_model(model), samples, losses)
"""

# Ranks that train apart: when they are averaged next is a count that Accelerate's object keeps.
LOCAL_SGD = """
from accelerate.local_sgd import LocalSGD
accelerator = Accelerator()
model, samples, turn = net(), [], 0
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True, drop_last=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(3):
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=3) as local_sgd:
        for i, x, y in loader:
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
            turn += 1
            samples.append(i.tolist())
            perhaps_die(turn)
tell(accelerator.unwrap_model(model), samples)
"""

# --- what is trained -------------------------------------------------------------------------------------------------

PARTS = """
class Low(nn.Module):
    def __init__(self, base, r=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(8, r, bias=False), nn.Linear(r, 32, bias=False)
    def forward(self, x): return self.base(x) + self.b(self.a(x))

class Counter:
    def __init__(self): self.seen = torch.zeros(5000)
    def state_dict(self): return {"seen": self.seen}
    def load_state_dict(self, state): self.seen = state["seen"]

accelerator = Accelerator()
model, critic, counter = net(), nn.Linear(1, 1), Counter()
model[0] = Low(model[0])
other = torch.optim.SGD(critic.parameters(), lr=1e-3, momentum=0.5)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True)
model, critic, optimizer, other, loader, scheduler = accelerator.prepare(
    model, critic, optimizer, other, loader, scheduler)
accelerator.register_for_checkpointing(counter)
scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
ema = torch.optim.swa_utils.AveragedModel(accelerator.unwrap_model(model))
compiled = torch.compile(accelerator.unwrap_model(critic), backend="eager") if COMPILED else critic
samples, turn, losses, best = [], 0, [], None
for epoch in range(3):
    for i, x, y in loader:
        out = model(x)
        loss = nn.functional.mse_loss(out, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        accelerator.backward(compiled(out.detach()).square().mean())
        other.step()
        other.zero_grad()
        counter.seen[i] += 1
        ema.update_parameters(accelerator.unwrap_model(model))
        losses.append(loss)
        if best is None or loss < best[0]:
            best = loss.item(), {k: v.clone() for k, v in accelerator.unwrap_model(model).state_dict().items()}
        samples.append(i.tolist())
        turn += 1
        perhaps_die(turn)
tell(accelerator.unwrap_model(model), samples, turn, scaler.state_dict(), counter.seen.tolist(),
     [loss.item() for loss in losses], {k: v.tolist() for k, v in ema.state_dict().items()},
     {k: v.tolist() for k, v in accelerator.unwrap_model(critic).state_dict().items()}, best[0],
     {k: v.tolist() for k, v in best[1].items()})
"""

# Gradients of four batches for one step; a checkpoint is asked for between two steps.
BETWEEN_STEPS = """
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler
model, data = DistributedDataParallel(net()), Noisy()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data))
samples, turn = [], 0
for epoch in range(4):
    loader.sampler.set_epoch(epoch)
    for i, x, y in loader:
        nn.functional.mse_loss(model(x), y).backward()
        turn += 1
        if turn % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
        if turn == 27:
            run.checkpoint()
        samples.append(i.tolist())
        perhaps_die(turn)
tell(model.module, samples, turn)
"""

SHARDED = """
class Told:
    def __init__(self, model):
        full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value
                for name, value in model.state_dict().items()}
        self.full = {name: value.detach().clone() for name, value in full.items()}
    def state_dict(self): return self.full

model = nn.Sequential(nn.Linear(8, 33), nn.LayerNorm(33), nn.Sequential(nn.Linear(33, 17), nn.ReLU()), nn.Linear(17, 1))
WRAP
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
loader, held_out = Accelerator().prepare(
    DataLoader(TensorDataset(torch.arange(96), torch.randn(96, 8)), batch_size=BATCH, shuffle=True),
    DataLoader(torch.randn(16, 8), batch_size=BATCH))
samples, turn, losses = [], 0, []
for epoch in range(3):
    for i, x in loader:
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        samples.append(i.tolist())
        turn += 1
        losses.append(loss.item())
        if turn % 4 == 0:
            with torch.no_grad():
                losses.append(sum(model(x).sum().item() for x in held_out))
        perhaps_die(turn)
tell(Told(model), samples, turn, losses)
"""
FULLY_SHARD = SHARDED.replace(
    "WRAP",
    """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
mesh = init_device_mesh("cpu", (world_size,))
fully_shard(model[2], mesh=mesh)
fully_shard(model, mesh=mesh)
""",
)
FLAT_SHARD = SHARDED.replace(
    "WRAP",
    """
from torch.distributed.fsdp import FullyShardedDataParallel
model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
""",
)
NESTED_FLAT_SHARD = FLAT_SHARD.replace(
    "model = Fully",
    "model[2] = FullyShardedDataParallel(model[2], use_orig_params=True, device_id=torch.device('cpu'))\nmodel = Fully",
)

# --- Trainers --------------------------------------------------------------------------------------------------------

TRAINER_PARTS = (
    TRAINER_ROWS
    + """class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.samples = net(), []

    def forward(self, x, labels=None, i=None):
        if self.training:
            samples.append(i.tolist())
        out = self.layers(x)
        return {"loss": nn.functional.mse_loss(out, labels), "logits": out}

class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        global turn
        turn += 1
        perhaps_die(turn)

def clean(logs):
    return {k: v for k, v in logs.items() if "runtime" not in k and "per_second" not in k}

def make(model, seed, epochs, kind=Trainer, callbacks=(), data=None, **more):
    more = {"save_strategy": "no", **more}
    arguments = TrainingArguments(more.pop("folder", None) or tempfile.mkdtemp(), num_train_epochs=epochs, seed=seed,
        per_device_train_batch_size=BATCH, learning_rate=1e-2, logging_steps=3, remove_unused_columns=False, use_cpu=True,
        report_to=[], disable_tqdm=True, **more)
    return kind(model, arguments, train_dataset=data or Rows(), eval_dataset=Rows(), callbacks=[Die(), *callbacks])

samples, turn = [], 0
"""
)

TRAINER_FOLDS = (
    TRAINER_PARTS
    + """
scores = []
for fold in range(4):
    trainer = make(Net(), fold, 1, max_steps=10)
    output = trainer.train()
    scores.append((clean(trainer.evaluate()), output.training_loss, trainer.predict(Rows()).metrics["test_loss"]))
tell(trainer.model, samples, turn, scores, [clean(logs) for logs in trainer.state.log_history])
"""
)

# The script's own checkpoints beside: it goes on from one, and takes the best in the end.
TRAINER_OWN_CHECKPOINTS = (
    TRAINER_PARTS
    + """
class Plain(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=BATCH, shuffle=True)

def main():
    folder = str(run.folder / "own")
    model, data = Net(), Rows()
    alike = dict(folder=folder, data=data, callbacks=[EarlyStoppingCallback(50)], save_strategy="steps", save_steps=5,
                 eval_strategy="steps", eval_steps=5, load_best_model_at_end=True)
    first = make(model, 1, 2, max_steps=10, **alike)
    first.train()
    torch.distributed.barrier()
    again = make(Net(), 1, 3, **alike)
    again.train(resume_from_checkpoint=folder + "/checkpoint-5")
    one = [p.tolist() for p in again.model.parameters()]
    plain = make(Net(), 2, 2, kind=Plain, data=data, group_by_length=False)
    plain.train()
    plain.train()
    tell(plain.model, samples, turn, one, [clean(logs) for logs in [*again.state.log_history, *plain.state.log_history]])

main()
"""
).replace(", group_by_length=False", "")

TRAINER_STREAM = (
    TRAINER_PARTS
    + """
from torch.utils.data import IterableDataset

class Stream(IterableDataset):
    def __iter__(self):
        source = torch.Generator().manual_seed(5)
        for i in range(64):
            x = torch.randn(8, generator=source)
            yield {"i": torch.tensor(i), "x": x, "labels": x[:1]}

trainer = make(Net(), 3, 1, data=Stream(), max_steps=40)
trainer.train()
tell(trainer.model, samples, turn, [clean(logs) for logs in trainer.state.log_history])
"""
)

# A Trainer, a loop of one's own that goes on with its model, and another Trainer.
TRAINER_AND_LOOP = (
    TRAINER_PARTS
    + """
accelerator, first = Accelerator(), make(Net(), 1, 1)
first.train()
score = first.evaluate()["eval_loss"]
model = net()
model.load_state_dict(first.model.layers.state_dict())
optimizer, loader = torch.optim.SGD(model.parameters(), lr=1e-2), DataLoader(Noisy(), batch_size=BATCH, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(2):
    for i, x, y in loader:
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        samples.append(i.tolist())
        turn += 1
        perhaps_die(turn)
second = make(Net(), 2, 1)
second.model.layers.load_state_dict(model.module.state_dict())
second.train()
tell(second.model, samples, turn, score, first.state.global_step, [p.tolist() for p in model.parameters()],
     [p.tolist() for p in first.model.parameters()])
"""
)

# No loader and no `for`: batches are cut from an array, the next one before the step, steps are counted by hand.
WHILE = """
model = nn.parallel.DistributedDataParallel(net())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
rows, samples, iter_num, best, max_iters = torch.randn(500, 8), [], 0, float("inf"), 41

def get_batch():
    at = torch.randint(500, (BATCH,))
    samples.append(at.tolist())
    return rows[at], rows[at].sum(1, keepdim=True)

X, Y = get_batch()
while True:
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / (1 + iter_num)
    for micro_step in range(2):
        model.require_backward_grad_sync = micro_step == 1
        loss = nn.functional.mse_loss(model(X), Y) / 2
        X, Y = get_batch()
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    best = min(best, loss.item())
    iter_num += 1
    perhaps_die(iter_num)
    if iter_num > max_iters:
        break
tell(model.module, samples, iter_num, best)
"""
WHILE_IN_FUNCTIONS = """
def epoch(model, optimizer, rows, samples, done):
    num = 0
    while num < 6 and done + num < 40:
        at = torch.randint(500, (BATCH,))
        samples.append(at.tolist())
        loss = nn.functional.mse_loss(model(rows[at]), rows[at].sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        num += 1
        perhaps_die(done + num)
    return num

def main():
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    rows, samples, done, epochs = torch.randn(500, 8), [], 0, 0
    for epochs in range(9):
        done += epoch(model, optimizer, rows, samples, done)
    tell(model.module, samples, done, epochs)

main()
"""
# Gradients that are never dropped, only decayed: a loop without zero_grad().
DECAYED_GRADIENTS = """
model = nn.parallel.DistributedDataParallel(net())
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
samples, turn = [], 0
for epoch in range(3):
    for i, x, y in DataLoader(Noisy(), batch_size=BATCH, shuffle=True):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        for p in model.parameters():
            p.grad.mul_(0.7)
        samples.append(i.tolist())
        turn += 1
        perhaps_die(turn)
tell(model.module, samples, turn)
"""

# What the first iteration makes before its first step, in a loop that draws from no loader.
MADE_AT_FIRST = """
from torch.nn.parallel import DistributedDataParallel
model = DistributedDataParallel(net())
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
mask, base, samples = None, torch.zeros(50_000), []
for turn in range(1, 41):
    if mask is None:
        mask, base[5] = torch.rand(50_000), 1
    loss = model(torch.randn(4, 8) + mask[turn]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    samples.append(loss.item())
    perhaps_die(turn)
tell(model.module, samples, turn, float(mask.sum()), float(base.sum()))
"""

# Each pass has an order of its own, which no generator of torch's decides.
OWN_SAMPLER = """
accelerator = Accelerator()
model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

class Rounds(torch.utils.data.Sampler):
    def __init__(self): self.numbers, self.round = np.random.default_rng(5), 0
    def __len__(self): return 96
    def __iter__(self):
        self.round += 1
        return iter(np.roll(self.numbers.permutation(96), self.round).tolist())

model, optimizer, loader = accelerator.prepare(
    model, optimizer, DataLoader(Noisy(), batch_size=BATCH, sampler=Rounds())
)
turn, samples = 0, []
for epoch in range(4):
    for i, x, y in loader:
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        samples.append(i.tolist())
        turn += 1
        perhaps_die(turn)
tell(accelerator.unwrap_model(model), samples, turn)
"""

# A data set as those of `datasets`, which is not installed here, look to a checkpoint.
DATA_SET = """
import pyarrow, random

class Dataset:
    column_names = ["x"]
    def __init__(self, rows, made): self.rows, self._fingerprint = rows, made
    def __len__(self): return len(self.rows)
    def __getitem__(self, at): return torch.tensor(self.rows[at])
    def with_format(self, _): return Taken(self.rows)
    def shuffle(self, seed):
        return Dataset(random.Random(seed).sample(self.rows, len(self.rows)), f"{self._fingerprint}, {seed}")

class Taken:
    def __init__(self, rows): self.rows = rows
    def __getitem__(self, places): return pyarrow.table({"x": [self.rows[at] for at in places]})

Dataset.__module__ = "datasets.arrow_dataset"
"""
DATA_OF_ROUNDS = (
    DATA_SET
    + """
accelerator = Accelerator()
model = nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
model, optimizer = accelerator.prepare(model, optimizer)
rows = Dataset([float(i) for i in range(96)], "made")
turn, samples = 0, []
for epoch in range(4):
    own = rows.shuffle(epoch)
    for x in accelerator.prepare(DataLoader(own, batch_size=BATCH)):
        accelerator.backward((model(x[:, None]) - 1).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        samples.append(x.tolist())
        turn += len(own) // 96
        perhaps_die(turn)
tell(accelerator.unwrap_model(model), samples, turn)
"""
)

MORE_CELLS = {
    "data of rounds": DATA_OF_ROUNDS,
    "made at first": MADE_AT_FIRST,
    "own sampler": OWN_SAMPLER,
    "while": WHILE,
    "while in functions": WHILE_IN_FUNCTIONS,
    "decayed gradients": DECAYED_GRADIENTS,
    "kept gradients": DECAYED_GRADIENTS.replace("p.grad.mul_(0.7)", "pass"),
    "while next": WHILE_NEXT,
    "for next": FOR_NEXT,
    "probed": PROBED,
    "counted": COUNTED,
    "break": BREAK,
    "skipped": SKIPPED,
    "class": CLASS,
    "module": MODULE,
    "folds": FOLDS,
    "prepared folds": PREPARED_FOLDS,
    "unfollowed": UNFOLLOWED,
    "local sgd": LOCAL_SGD,
    "parts": PARTS.replace("COMPILED", "False"),
    "compiled": PARTS.replace("COMPILED", "True"),
    "between steps": BETWEEN_STEPS,
    "fully_shard": FULLY_SHARD,
    "flat shard": FLAT_SHARD,
    "nested flat shard": NESTED_FLAT_SHARD,
    "flat shard as it is trained": FLAT_SHARD.replace("use_orig_params=True, ", "").replace("turn % 4 == 0", "False"),
    "flat shard of flat parameters": NESTED_FLAT_SHARD.replace("use_orig_params=True", "use_orig_params=False"),
    "trainer folds": TRAINER_FOLDS,
    "trainer own checkpoints": TRAINER_OWN_CHECKPOINTS,
    "trainer stream": TRAINER_STREAM,
    "trainer and loop": TRAINER_AND_LOOP,
}
