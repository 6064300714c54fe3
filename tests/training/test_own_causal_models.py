"""Causal language models of a cell's own: trained on two ranks, saved with their source, and generated with as they are."""

from __future__ import annotations

import asyncio

import pytest

from jupyter_llmcloud.inference.engines.base import Generation, Sampling
from jupyter_llmcloud.inference.replica import ReplicaSpec, open_model
from jupyter_llmcloud.storage.model_folder import ARCHITECTURE, ARCHITECTURE_SOURCE, check_folder, model_kind
from tests.support.worlds import Ranks

DATA = """
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tests.support.tiny_models import word_tokenizer

torch.manual_seed(1)
tokenizer = word_tokenizer()
text = torch.tensor([tokenizer("the film is good and the film was bad")["input_ids"]])
accelerator = Accelerator()

class Block(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(size, 3 * size), torch.nn.Linear(size, size)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True))

class Nano(torch.nn.Module):
    def __init__(self, num_tokens, size=32, block_size=24):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(num_tokens, size), torch.nn.Embedding(block_size, size)
        self.block, self.head = Block(size), torch.nn.Linear(size, num_tokens, bias=False)

    def forward(self, ids):
        return self.head(self.block(self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))))
"""
MODULE = """
model = Nano(len(tokenizer))
def scores_of(ids):
    return model(ids)
"""
OWN_CLASS = """
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class OwnConfig(PreTrainedConfig):
    model_type = "own-of-a-cell"

class OwnForCausalLM(PreTrainedModel{mixin}):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = Nano(config.vocab_size, block_size=config.max_position_embeddings)
        self.post_init()

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.inner(input_ids))

model = OwnForCausalLM(OwnConfig(vocab_size=len(tokenizer), max_position_embeddings=24))
def scores_of(ids):
    return model(ids).logits
"""
TRAIN = """
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
model, optimizer, loader = accelerator.prepare(
    model, optimizer, torch.utils.data.DataLoader(text.repeat(32, 1), batch_size=2))
for batch in loader:
    loss = cross_entropy(scores_of(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
ids = text[:, :3]
for _ in range(6):
    ids = torch.cat([ids, scores_of(ids)[:, -1].argmax(-1, keepdim=True)], 1)
expected = ids[0].tolist()
"""


@pytest.mark.parametrize(
    "code",
    [MODULE, OWN_CLASS.replace("{mixin}", ", GenerationMixin"), OWN_CLASS.replace("{mixin}", "")],
    ids=["plain module", "own class with generate but no cache", "own class without generate"],
)
def test_it_answers_as_in_the_notebook(world: Ranks, code: str) -> None:
    outcome = world.ok(DATA + code + TRAIN, save=["model", "tokenizer"])
    folder, expected = outcome.folder.model, world.pull("expected")
    assert "class Nano(" in (folder / ARCHITECTURE_SOURCE).read_text()
    assert model_kind(check_folder(folder, is_own=True)) in ("module", "generator")
    spec = ReplicaSpec(
        endpoint="e", model=str(folder), socket="", token="t", served_name="own", source=str(folder / ARCHITECTURE)
    )

    async def generated() -> list[int]:
        served = await open_model(spec, num_threads=1)
        try:
            stream = served.engine.submit(Generation(expected[:3], 6, Sampling(temperature=0.0)))
            return [token async for batch in stream for token in batch.tokens]
        finally:
            await served.close()

    assert asyncio.run(generated()) == expected[3:]
