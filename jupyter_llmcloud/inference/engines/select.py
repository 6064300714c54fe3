"""Picks the engine for a model, and believes it only after a trial against the model's plain forward pass."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.base import Engine, EngineError
from jupyter_llmcloud.inference.engines.kv_cache import free_memory, plan_cache
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.slots.attention import Unsuitable
from jupyter_llmcloud.inference.engines.trial import (
    LENGTHS,
    Lockstep,
    compare_with_forward,
    positions_that_see_length,
    why_one_at_a_time,
)
from jupyter_llmcloud.system.patching import Patch

log = logging.getLogger(__name__)

BATCHED = ("slots", "continuous-batching")
ENGINES = (*BATCHED, "generate")
# Which of them comes depends on where in transformers an architecture turns out not to fit.
_DOES_NOT_FIT = (EngineError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, ImportError, Unsuitable)
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


async def open_engine(
    loaded: LoadedModel, max_concurrent: int, num_threads: int | None = None, name: str = "auto"
) -> Engine:
    """The fastest engine that answers as the model itself does. It has generated its first tokens already.

    Args:
        loaded: the model.
        max_concurrent: sequences in one batch.
        num_threads: CPU threads of a step.
        name: one of `ENGINES`; "auto" tries them in turn. Raises `ModelError` when it does not fit the model.
    """
    if name not in ("auto", *ENGINES):
        raise ModelError(f"engine {name!r} is not known: choose one of auto, {', '.join(ENGINES)}.")
    if name == "generate":
        return await _tried_generating(loaded, max_concurrent, num_threads)
    for candidate in (BATCHED if loaded.model.device.type == "cpu" else BATCHED[1:]) if name == "auto" else (name,):
        attention = loaded.model.config._attn_implementation
        reason = why_not_batched(loaded)
        if reason is None and candidate == "continuous-batching":
            reason = BATCHING.problem()
        if reason is None:
            try:
                return await _tried_batching(candidate, loaded, max_concurrent, num_threads)
            except _DOES_NOT_FIT as error:
                reason = f"{type(error).__name__}: {error}"
                loaded.model.set_attn_implementation(attention)
        if name != "auto":
            raise ModelError(f"--engine {name} cannot serve this model: {reason}. --engine auto finds one that can.")
        log.warning("not served by %s: %s", candidate, reason)
    log.warning("no batches, serving one sequence per thread")
    return await _tried_generating(loaded, max_concurrent, num_threads)


def why_not_batched(loaded: LoadedModel) -> str | None:
    """Why this architecture cannot be batched continuously, as far as its class tells; None: try it."""
    kind = type(loaded.model).__name__
    if loaded.is_encoder_decoder:
        return f"{kind} is an encoder-decoder"
    if getattr(loaded.model, "_is_stateful", False):
        return f"{kind} keeps a state instead of keys and values"
    if not getattr(loaded.model, "_supports_attention_backend", False):
        return f"{kind} has an attention of its own"
    return positions_that_see_length(loaded)


async def _tried_batching(name: str, loaded: LoadedModel, max_concurrent: int, num_threads: int | None) -> Engine:
    kind: Any
    if name == "slots":
        from jupyter_llmcloud.inference.engines.slots.engine import SlotEngine as kind
    else:
        from jupyter_llmcloud.inference.engines.continuous_batching import ContinuousBatchingEngine as kind

    device = loaded.model.device
    plan = plan_cache(
        loaded.model.config,
        loaded.model.dtype,
        context_length=loaded.context_length,
        max_concurrent=max_concurrent,
        free=free_memory(device),
        max_bytes=loaded.cache_bytes,
        device_type=device.type,
    )
    engine: Engine = await asyncio.to_thread(kind, loaded, plan, max_concurrent, num_threads)
    return await _tried(engine, compare_with_forward(engine, loaded))


async def _tried_generating(loaded: LoadedModel, max_concurrent: int, num_threads: int | None) -> Engine:
    from jupyter_llmcloud.inference.engines.generate import MAX_PARALLEL, GenerateEngine

    num_parallel = min(MAX_PARALLEL, max_concurrent, len(LENGTHS))
    reason = why_one_at_a_time(loaded) if num_parallel > 1 else "--max-concurrent is 1"
    if reason is None:
        engine = GenerateEngine(loaded, num_parallel, num_threads)
        engine.lockstep = Lockstep(num_parallel)
        try:
            await _tried(engine, compare_with_forward(engine, loaded, num_parallel))
            engine.lockstep = None
            return engine
        except EngineError as error:
            reason = f"sequences that ran at once were mixed: {error}"
    log.warning("serving one sequence at a time: %s", reason)
    engine = GenerateEngine(loaded, 1, num_threads)
    try:
        return await _tried(engine, compare_with_forward(engine, loaded))
    except EngineError as error:
        raise ModelError(f"the model loads, but what it generates is not what it computes: {error}") from error


async def _tried(engine: Engine, trial: Awaitable[None]) -> Engine:
    try:
        await trial
    except BaseException:
        await engine.close()
        raise
    return engine
