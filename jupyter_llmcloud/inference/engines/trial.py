"""The trial of an engine: several sequences at once, each compared with the model's own forward pass over it alone."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch

from jupyter_llmcloud.inference.engines.base import Engine, EngineError, Generation, Sampling, TokenBatch
from jupyter_llmcloud.inference.engines.loading import LoadedModel

log = logging.getLogger(__name__)

LENGTHS = (12, 5, 9, 3)  # of the prompts: they are all different, so that no two sequences are at the same place
_TOKENS = 4
_LOGPROBS = 8
_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
_MEET_S = 30.0
# What torch itself keeps in the dictionary of a module.
_OF_TORCH = frozenset(vars(torch.nn.Module()))
_SEES_LENGTH = ("dynamic", "longrope")


class Lockstep:
    """Lets the threads of a trial take each step together: all prompts are read before any gets its second token.

    Without it, the sequences of a tiny model would be over one after the other, and nothing would be tried.
    """

    def __init__(self, num_sequences: int) -> None:
        self._num_sequences = num_sequences
        self._num_arrived = 0
        self._step = 0
        self._moved = threading.Condition()

    def arrive(self) -> None:
        """Wait until every sequence that goes on is here; no longer than a time that says that one is stuck."""
        with self._moved:
            self._num_arrived += 1
            step = self._step
            self._open_if_complete()
            self._moved.wait_for(lambda: self._step != step, _MEET_S)

    def leave(self) -> None:
        """A sequence has ended."""
        with self._moved:
            self._num_sequences -= 1
            self._open_if_complete()

    def _open_if_complete(self) -> None:
        if self._num_arrived and self._num_arrived >= self._num_sequences:
            self._num_arrived = 0
            self._step += 1
            self._moved.notify_all()


async def compare_with_forward(engine: Engine, loaded: LoadedModel, num_sequences: int = len(LENGTHS)) -> None:
    """Raise `EngineError` unless log probabilities, of sequences that run together, are those of a forward pass."""
    prompts = [_prompt(length, loaded) for length in LENGTHS[:num_sequences]]
    sampling = Sampling(temperature=0.0, num_logprobs=min(_LOGPROBS, loaded.num_vocabulary))
    answers = await asyncio.gather(*(_collect(engine, Generation(prompt, _TOKENS, sampling)) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        error = await asyncio.to_thread(_largest_error, loaded, prompt, answer)
        tolerance = _TOLERANCE.get(loaded.model.dtype, 0.5)
        if not error <= tolerance:
            raise EngineError(f"log probabilities are off by {error:.3g} (up to {tolerance:g} is rounding)")


def _prompt(length: int, loaded: LoadedModel) -> list[int]:
    tokens = [(7 * position + 3 + length) % loaded.num_vocabulary for position in range(length)]
    return tokens[: max(1, loaded.context_length - _TOKENS)]


async def _collect(engine: Engine, generation: Generation) -> TokenBatch:
    stream = engine.submit(generation)
    tokens, logprobs = [], []
    try:
        async for batch in stream:
            tokens += batch.tokens
            logprobs += batch.logprobs
    finally:
        stream.close()
    return TokenBatch(tokens, logprobs, None)


@torch.inference_mode()
def _largest_error(loaded: LoadedModel, prompt: list[int], answer: TokenBatch) -> float:
    expected = _scores(loaded, prompt, answer.tokens).float().log_softmax(dim=-1)
    differences = [
        abs(float(expected[step, token]) - logprob)
        for step, entry in enumerate(answer.logprobs)
        for token, logprob in entry.top
        if step or not _is_forced(loaded)
    ]
    # By torch: the largest of numbers among which is NaN is NaN, wherever it stands.
    return float(torch.tensor([0.0, *differences]).max())


def _is_forced(loaded: LoadedModel) -> bool:
    """Whether the first token of every answer is one that the checkpoint says, whatever its scores: BART does."""
    return loaded.is_encoder_decoder and loaded.model.generation_config.forced_bos_token_id is not None


def _scores(loaded: LoadedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The scores of each token of the answer, in one forward pass over this sequence alone, without a cache."""
    model: Any = loaded.model
    device = model.device
    if loaded.is_encoder_decoder:
        start = model.generation_config.decoder_start_token_id
        start = model.config.decoder_start_token_id if start is None else start
        given = torch.tensor([prompt], device=device)
        decoded = torch.tensor([[start, *answer[:-1]]], device=device)
        scores: torch.Tensor = model(input_ids=given, decoder_input_ids=decoded, use_cache=False).logits[0]
        return scores
    sequence = torch.tensor([prompt + answer[:-1]], device=device)
    scores = model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 :]
    return scores


def why_one_at_a_time(loaded: LoadedModel) -> str | None:
    """Why two sequences of this model must not run at once; None: nothing is known against it.

    A model that keeps something in its modules from one forward pass to the next mixes the sequences that share it.
    """
    if reason := positions_that_see_length(loaded):
        return reason
    if kept := _kept_in_modules(loaded):
        return f"it keeps a state in its modules ({', '.join(kept[:3])})"
    return None


def positions_that_see_length(loaded: LoadedModel) -> str | None:
    """Positions that are computed anew for long sequences, for all of a batch and with a state in the module."""
    rope = getattr(loaded.model.config.get_text_config(), "rope_parameters", None) or {}
    settings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for entry in settings:
        original = entry.get("original_max_position_embeddings") or loaded.context_length
        if entry.get("rope_type") in _SEES_LENGTH and loaded.context_length > original:
            return (
                f"its positions ({entry['rope_type']}) change beyond {original} tokens: "
                f"--max-model-len {original} serves many sequences at once"
            )
    return None


@torch.inference_mode()
def _kept_in_modules(loaded: LoadedModel) -> list[str]:
    """The attributes of modules that a forward pass changes. The longest one comes first: tables may grow to it."""
    model = loaded.model
    if loaded.is_encoder_decoder:
        return []  # their caches are arguments in all of transformers, and their trial says so
    try:
        for length in LENGTHS[:2]:
            before = dict(_attributes(model))
            model(input_ids=torch.tensor([_prompt(length, loaded)], device=model.device), use_cache=True)
    except Exception as error:  # code of any architecture: the trial of the engine tells what is wrong
        log.info("its modules were not looked at: %s: %s", type(error).__name__, error)
        return []
    return [name for name, value in _attributes(model) if before.get(name) != value]


def _attributes(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
        for name, value in {**own, **dict(module.named_buffers(recurse=False))}.items():
            yield f"{path}.{name}".lstrip("."), _version(value)


def _version(value: Any) -> Any:
    """What changes when a value is replaced, or in the common ways to change it in place."""
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, list | dict | set):
        return id(value), len(value)
    return value if isinstance(value, int | float | str | bool | None) else id(value)
