"""A small language model on prepared batches; each rank tells its pid at once, and the seconds of each step at the end."""

import json
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

NUM_STEPS, WARM_UP, ROWS, LENGTH, VOCABULARY = 90, 45, 16, 64, 512

folder = Path(os.environ.get("BENCH_FOLDER") or BENCH_FOLDER)  # noqa: F821  (a cell gets it by its text)
accelerator = Accelerator()
(folder / f"pid-{accelerator.process_index}").write_text(str(os.getpid()))
set_seed(0)
config = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
)
steps = torch.arange(LENGTH).repeat(NUM_STEPS * ROWS * 2, 1)
tokens = (steps * torch.randint(1, 9, (len(steps), 1)) + torch.randint(VOCABULARY, (len(steps), 1))) % VOCABULARY
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(tokens, batch_size=ROWS))
seconds, rows, losses = [], [], []
start = time.perf_counter()
for batch in loader:
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item() * len(batch))
    rows.append(len(batch))
    now = time.perf_counter()
    seconds.append(now - start)
    start = now
told = {"seconds": seconds, "rows": rows, "losses": losses, "warm_up": WARM_UP}
(folder / f"report-{accelerator.process_index}.json").write_text(json.dumps(told))
accelerator.wait_for_everyone()
