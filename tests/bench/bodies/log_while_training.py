"""Steps of about 20 ms that keep a core busy, each with a log of five floats."""

import torch

NUM_STEPS = 400
name = "loss" if rank == 0 else "loss_of_another"  # noqa: F821  (the cell's)
layers = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(4)])
inputs = torch.randn(256, 512)
for step in range(NUM_STEPS):
    loss = layers(inputs).square().mean()
    loss.backward()
    values = {name: loss.item(), "lr": 3e-4, "grad_norm": 1.25, "tokens_per_s": 6100.5, "epoch": step / NUM_STEPS}
    run.log(values, step=step)  # noqa: F821
