"""A module with a forward of its own as a text generator: believed when it shows that it is one, and no other ever is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

from jupyter_llmcloud.inference.engines.base import Generation, Sampling
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.select import open_engine
from jupyter_llmcloud.inference.own_models.causal_module import NotAGenerator, as_generator
from jupyter_llmcloud.inference.own_models.opening import load_object, without_generate
from tests.support.tiny_models import word_tokenizer

TOKENIZER = word_tokenizer()
NUM_TOKENS = len(TOKENIZER)


class Causal(torch.nn.Module):
    """A layer of attention. `gives` says in which form its scores come."""

    def __init__(self, gives: str = "tensor", size: int = 16, block_size: int = 20, is_causal: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(NUM_TOKENS, size), torch.nn.Embedding(block_size, size)
        self.qkv, self.head = torch.nn.Linear(size, 3 * size), torch.nn.Linear(size, NUM_TOKENS)
        self.gives, self.is_causal = gives, is_causal

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)

    def forward(self, ids: torch.Tensor, targets: Any = None) -> Any:
        x = self.hidden(ids)
        scores = self.head(x[:, [-1]] if self.gives == "last" else x)
        return {"tuple": (scores, None), "dict": {"logits": scores, "hidden": x}, "last": (scores, None)}.get(
            self.gives, scores
        )


class Hidden(Causal):
    def forward(self, ids: torch.Tensor, targets: Any = None) -> Any:
        return self.hidden(ids)


class Labels(Causal):
    def forward(self, ids: torch.Tensor, targets: Any = None) -> Any:
        return self.head(self.hidden(ids))[..., :3]


class Whole(Causal):
    def forward(self, ids: torch.Tensor, targets: Any = None) -> Any:
        return super().forward(ids)[:, -1]


class Needy(Causal):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(ids)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def greedy(module: torch.nn.Module, prompt: list[int], number: int) -> list[int]:
    ids = list(prompt)
    for _ in range(number):
        output: Any = module(torch.tensor([ids]))
        scores = output[0] if isinstance(output, tuple) else output["logits"] if isinstance(output, dict) else output
        ids.append(int(scores[0, -1].argmax()))
    return ids[len(prompt) :]


def generated(loaded: LoadedModel, prompt: list[int], number: int) -> list[int]:
    async def ask() -> list[int]:
        engine = await open_engine(loaded, 2, 1)
        try:
            stream = engine.submit(Generation(prompt, number, Sampling(temperature=0.0)))
            return [token async for batch in stream for token in batch.tokens]
        finally:
            await engine.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("gives", ["tensor", "tuple", "dict", "last"])
def test_a_forward_that_gives_scores_generates_what_it_computes(gives: str) -> None:
    module = Causal(gives).eval()
    loaded = as_generator(module, TOKENIZER)
    assert (loaded.context_length, loaded.num_vocabulary) == (20, NUM_TOKENS)
    assert generated(loaded, [5, 6, 7], 6) == greedy(module, [5, 6, 7], 6)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Causal(is_causal=False), "both directions"),
        (Hidden(size=17), "no scores of the 13 tokens"),
        (Labels(), "no scores of the 13 tokens"),
        (Whole(), "gives no scores"),
        (Needy(), "does not take the ids"),
        (torch.nn.Linear(4, 4), "does not take the ids"),
    ],
    ids=["encoder", "hidden states", "labels", "of the whole text", "needs more", "no ids"],
)
def test_what_is_no_generator_is_never_taken_for_one(module: torch.nn.Module, why: str) -> None:
    with pytest.raises(NotAGenerator, match=why):
        as_generator(module.eval(), TOKENIZER)


def test_the_context_is_as_long_as_forward_takes_whatever_is_said() -> None:
    class Told(Causal):
        config = {"block_size": 64}

    assert as_generator(Told(block_size=31).eval(), TOKENIZER).context_length == 31
    assert as_generator(Told(block_size=64).eval(), TOKENIZER).context_length == 64


def test_a_kept_object_with_its_tokenizer_is_loaded_and_one_without_generates_nothing(tmp_path: Path) -> None:
    module, file = Causal().eval(), tmp_path / "object.pkl"
    file.write_bytes(cloudpickle.dumps({"model": module, "tokenizer": TOKENIZER}))
    loaded = load_object(file, "auto", "cpu", 16)
    assert loaded.context_length == 16
    with pytest.raises(NotAGenerator, match="already"):
        without_generate(loaded)
    file.write_bytes(cloudpickle.dumps(module))
    with pytest.raises(NotAGenerator, match="no tokenizer"):
        load_object(file, "auto", "cpu", None)
