"""Picks the engine for a model, and believes it only after a trial against the model's plain forward pass."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import torch

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.base import Engine, EngineError, Generation, Sampling, TokenBatch
from jupyter_llmcloud.inference.engines.kv_cache import free_memory, plan_cache
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.system.patching import Patch

log = logging.getLogger(__name__)

_TRIAL_LENGTHS = (12, 5)
_TRIAL_TOKENS = 3
_TRIAL_LOGPROBS = 8
# Which of them comes depends on where in transformers an architecture turns out not to fit.
_DOES_NOT_FIT = (EngineError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, ImportError)
_CB = "transformers.generation.continuous_batching"
_PROCESSORS = f"{_CB}.cb_logits_processors:ContinuousBatchingLogitsProcessorList"
# Nothing of it is replaced, but our sampler stands where the library has a private class of its own.
BATCHING = Patch(
    feature="Continuous batching",
    why="The library's own logits processors know no seed per request and sort the vocabulary twice per token.",
    without="The model is served by generate(), one sequence per thread.",
    checked="transformers 5.23 to 5.24",
    targets={
        "transformers:ContinuousBatchingConfig": None,
        "transformers:ContinuousBatchingManager.add_request": ("input_ids", "request_id", "max_new_tokens"),
        "transformers:ContinuousBatchingManager.register_result_handler": ("request_id",),
        "transformers:ContinuousBatchingManager.cancel_request": ("request_id",),
        "transformers:ContinuousBatchingManager.stop": (),
        "transformers:ContinuousBatchingManager.warmup": (),
        "transformers:GenerationMixin.init_continuous_batching": (),
        f"{_PROCESSORS}.__call__": ("input_ids", "scores", "logits_processor_args"),
        f"{_PROCESSORS}.prepare_tensor_args": ("requests_in_batch", "arg_storage"),
        f"{_PROCESSORS}.fill_defaults": (),
        f"{_PROCESSORS}.check_kwargs": (),
    },
)
_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


async def open_engine(loaded: LoadedModel, max_concurrent: int) -> Engine:
    """The fastest engine that answers as the model itself does. It has generated its first tokens already."""
    reason = why_not_batched(loaded) or BATCHING.problem()
    if reason is None:
        attention = loaded.model.config._attn_implementation
        try:
            return await _tried_batching(loaded, max_concurrent)
        except _DOES_NOT_FIT as error:
            reason = f"{type(error).__name__}: {error}"
            loaded.model.set_attn_implementation(attention)
    log.warning("no continuous batching, serving one sequence per thread: %s", reason)
    return await _tried_generating(loaded, max_concurrent)


def why_not_batched(loaded: LoadedModel) -> str | None:
    """Why this architecture cannot be batched continuously, as far as its class tells; None: try it."""
    kind = type(loaded.model).__name__
    if loaded.is_encoder_decoder:
        return f"{kind} is an encoder-decoder"
    if getattr(loaded.model, "_is_stateful", False):
        return f"{kind} keeps a state instead of keys and values"
    if not getattr(loaded.model, "_supports_attention_backend", False):
        return f"{kind} has an attention of its own"
    return None


async def _tried_batching(loaded: LoadedModel, max_concurrent: int) -> Engine:
    from jupyter_llmcloud.inference.engines.continuous_batching import ContinuousBatchingEngine

    device = loaded.model.device
    plan = plan_cache(
        loaded.model.config,
        loaded.model.dtype,
        context_length=loaded.context_length,
        max_concurrent=max_concurrent,
        free=free_memory(device),
        device_type=device.type,
    )
    engine = await asyncio.to_thread(ContinuousBatchingEngine, loaded, plan, max_concurrent)
    try:
        await _compare_with_forward(engine, loaded)
    except BaseException:
        await engine.close()
        raise
    return engine


async def _tried_generating(loaded: LoadedModel, max_concurrent: int) -> Engine:
    from jupyter_llmcloud.inference.engines.generate import GenerateEngine

    engine = GenerateEngine(loaded, max_concurrent)
    try:
        await _collect(engine, Generation(_trial_prompt(4, loaded.num_vocabulary), 1))
    except EngineError as error:
        await engine.close()
        raise ModelError(f"the model loads but generates nothing: {error}") from error
    return engine


async def _compare_with_forward(engine: Engine, loaded: LoadedModel) -> None:
    """Raise `EngineError` unless log probabilities, in a mixed batch, are those of a plain forward pass."""
    prompts = [_trial_prompt(length, loaded.num_vocabulary) for length in _TRIAL_LENGTHS]
    prompts = [prompt[: max(1, loaded.context_length - _TRIAL_TOKENS)] for prompt in prompts]
    sampling = Sampling(temperature=0.0, num_logprobs=min(_TRIAL_LOGPROBS, loaded.num_vocabulary))
    answers = await asyncio.gather(
        *(_collect(engine, Generation(prompt, _TRIAL_TOKENS, sampling)) for prompt in prompts)
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        error = await asyncio.to_thread(_largest_error, loaded, prompt, answer)
        tolerance = _TOLERANCE.get(loaded.model.dtype, 0.5)
        if not error <= tolerance:
            raise EngineError(f"log probabilities are off by {error:.3g} (up to {tolerance:g} is rounding)")


def _trial_prompt(length: int, num_vocabulary: int) -> list[int]:
    return [(7 * position + 3) % num_vocabulary for position in range(length)]


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
    sequence = torch.tensor([prompt + answer.tokens[:-1]], device=loaded.model.device)
    logits: Any = loaded.model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 :].float()
    expected = logits.log_softmax(dim=-1)
    differences = [
        abs(float(expected[step, token]) - logprob)
        for step, entry in enumerate(answer.logprobs)
        for token, logprob in entry.top
    ]
    return max(differences)
