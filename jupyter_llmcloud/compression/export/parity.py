"""Whether another runtime computes what a model does: the scores of a text, and what both generate by themselves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from jupyter_llmcloud.errors import ModelError, UsageError
from jupyter_llmcloud.inference.engines.loading import LoadedModel

GREEDY_TOKENS = 256
PROMPT = "The "
# Of the largest score: rounding of the weights is not that large, and a graph that is wrong is farther off.
FAR = {"f32": 0.01, "f16": 0.05, "bf16": 0.05, "q8_0": 0.2}
Scores = Callable[[Sequence[int]], Any]  # token ids -> [tokens, vocabulary]


def check_installed(package: str, to: str) -> None:
    """Raise UsageError that says how to install what is missing."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"--to {to} needs the package {package}: pip install 'jupyter-llmcloud[export]'.")


def prompt_of(loaded: LoadedModel) -> list[int]:
    """A few tokens that generation begins with."""
    tokens: list[int] = loaded.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    return tokens or [0, 1]


@torch.inference_mode()
def model_scores(loaded: LoadedModel, tokens: Sequence[int]) -> torch.Tensor:
    """[tokens, vocabulary] of the model itself."""
    scores: torch.Tensor = loaded.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float()
    return scores


def greedy(loaded: LoadedModel, num_tokens: int) -> list[int]:
    """The prompt and the likeliest tokens that follow it, by the model itself."""
    prompt = prompt_of(loaded)
    with torch.inference_mode():
        rows = loaded.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )
    return [int(token) for token in rows[0]]


def num_greedy(loaded: LoadedModel) -> int:
    """How many tokens are compared: 256, or as many as the context has."""
    return max(1, min(GREEDY_TOKENS, loaded.context_length - len(prompt_of(loaded)) - 1))


def compare(loaded: LoadedModel, scores: Scores, runtime: str, weights: str = "f32") -> list[str]:
    """Notes on the largest difference of scores, and of greedy tokens. Raises ModelError when they are not alike.

    The greedy tokens of another runtime are those that it finds likeliest after what the model has written so far: in
    one pass over the model's own text, which says the same as generating until the first one that differs.
    """
    wanted = num_greedy(loaded)
    tokens = greedy(loaded, wanted)
    expected, found = model_scores(loaded, tokens), torch.as_tensor(scores(tokens)).float()
    if found.shape != expected.shape:
        raise ModelError(f"{runtime} gives scores of the shape {tuple(found.shape)}, not {tuple(expected.shape)}.")
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    begin = len(tokens) - wanted - 1
    unlike = (found.argmax(dim=-1) != expected.argmax(dim=-1))[begin:-1].nonzero().flatten()
    if not difference <= FAR[weights] * largest:
        raise ModelError(
            f"what {runtime} computes of the file is not what the model computes: scores differ by up to "
            f"{difference:.3g} (they are up to {largest:.3g}). The file was not kept."
        )
    same = f"all {wanted} greedy tokens are the same"
    if len(unlike):
        first = int(unlike[0]) + 1
        same = f"{wanted - len(unlike)} of {wanted} greedy tokens are the same, the first other one is number {first}"
    return [f"{runtime}: largest difference of scores {difference:.2g} (scores up to {largest:.3g}); {same}"]
