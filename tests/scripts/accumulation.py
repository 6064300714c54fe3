"""Fit a curve with gradient accumulation, a learning-rate schedule and gradient clipping."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

NUM_EPOCHS = 6
ACCUMULATE = 4

accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
set_seed(2)

x = torch.linspace(-3, 3, 2048).unsqueeze(1)
y = torch.sin(2 * x) + 0.3 * x
loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)

model = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=1e-2, total_steps=NUM_EPOCHS * len(loader) // ACCUMULATE
)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

num_updates = 0
losses = []
progress = tqdm(total=NUM_EPOCHS * len(loader), disable=not accelerator.is_local_main_process)
for _ in range(NUM_EPOCHS):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                gradient_norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                num_updates += 1
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        progress.update()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.log(
        {"loss": losses[-1], "learning_rate": scheduler.get_last_lr()[0], "gradient_norm": float(gradient_norm)},
        step=num_updates,
    )
progress.close()

accelerator.print(f"{num_updates} updates, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
accelerator.end_training()
