"""Cells that train one small model whatever their plan is: an ordinary Accelerate body, its losses and its weights."""

from __future__ import annotations

LLAMA = """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed({seed})
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers={layers}, num_attention_heads=4,
                     num_key_value_heads=4, max_position_embeddings=16, tie_word_embeddings={tied})
model = LlamaForCausalLM(config)
rows = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(1))
"""
BODY = """
accelerator = Accelerator()
optimizer = torch.optim.{optimizer}
loader = DataLoader(rows, batch_size={batch}, shuffle={shuffle})
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
norms = []
losses, step = [], 0
for epoch in range({epochs}):
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        norms.append(accelerator.clip_grad_norm_(model.parameters(), {clip}).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        step += 1
        {after}
"""
WEIGHTS = """
state = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
"""


def training(
    *,
    batch: int,
    layers: int = 2,
    shuffle: bool = False,
    clip: float = 1.0,
    epochs: int = 1,
    optimizer: str = "AdamW(model.parameters(), lr=1e-2)",
    after: str = "pass",
    seed: str = "0",
    tied: bool = False,
    make: str = LLAMA,
    weights: bool = True,
) -> str:
    """The text of a cell."""
    body = BODY.format(batch=batch, epochs=epochs, clip=clip, shuffle=shuffle, optimizer=optimizer, after=after)
    return make.format(seed=seed, tied=tied, layers=layers) + body + (WEIGHTS if weights else "")
