"""Classify points on two spirals; the accuracy is counted over all processes with `gather_for_metrics`."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def spirals(num_points, seed):
    generator = torch.Generator().manual_seed(seed)
    angle = 8 * torch.rand(num_points, generator=generator) + 0.5
    arm = torch.arange(num_points) % 2
    turned = angle + torch.pi * arm
    points = torch.stack([angle * turned.cos(), angle * turned.sin()], dim=1)
    return points / 4 + 0.05 * torch.randn(num_points, 2, generator=generator), arm


accelerator = Accelerator()
set_seed(1)

train_loader = DataLoader(TensorDataset(*spirals(2400, seed=1)), batch_size=32, shuffle=True)
eval_loader = DataLoader(TensorDataset(*spirals(301, seed=2)), batch_size=32)  # 301 = 9 full batches and 13 points

model = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
criterion = nn.CrossEntropyLoss()

model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)

for epoch in range(8):
    model.train()
    for points, labels in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(points), labels)
        accelerator.backward(loss)
        optimizer.step()

    model.eval()
    num_correct, num_seen = 0, 0
    for points, labels in eval_loader:
        with torch.no_grad():
            predictions = model(points).argmax(dim=-1)
        all_predictions, all_labels = accelerator.gather_for_metrics((predictions, labels))
        num_correct += (all_predictions == all_labels).sum().item()
        num_seen += len(all_labels)
    accuracy = num_correct / num_seen
    accelerator.log({"loss": loss.item(), "accuracy": accuracy}, step=epoch)
    accelerator.print(f"epoch {epoch}: accuracy {accuracy:.3f} over {num_seen} points")

accelerator.end_training()
