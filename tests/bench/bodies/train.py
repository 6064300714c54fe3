"""Train the quickstart's model for a while on random tokens; tell the wall and CPU seconds of each step."""

import json
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

NUM_STEPS, BATCH, LENGTH, VOCABULARY = 40, 8, 128, 2048

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

seconds, cpu_seconds = [], []
for step, batch in enumerate(tokens):
    start, cpu_start = time.perf_counter(), time.process_time()
    mine = batch[accelerator.process_index :: accelerator.num_processes]
    loss = model(input_ids=mine, labels=mine).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.log({"loss": loss.item()}, step=step)
    accelerator.print(f"step {step}: loss {loss.item():.4f}")
    seconds.append(time.perf_counter() - start)
    cpu_seconds.append(time.process_time() - cpu_start)

if accelerator.is_main_process:
    folder = Path(os.environ.get("BENCH_FOLDER") or BENCH_FOLDER)  # noqa: F821  (a cell gets it by --push)
    report = {"tokens_per_step": BATCH * LENGTH, "seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss.item()}
    (folder / "report.json").write_text(json.dumps(report))
accelerator.wait_for_everyone()
