"""Picks the engine for a model, and believes it only after a trial against the model's plain forward pass."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.base import Engine, EngineError
from jupyter_llmcloud.inference.engines.kv_cache import free_memory, plan_cache
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.trial import (
    LENGTHS,
    Lockstep,
    compare_with_forward,
    positions_that_see_length,
    why_one_at_a_time,
)
from jupyter_llmcloud.system.patching import Patch

log = logging.getLogger(__name__)

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


async def open_engine(loaded: LoadedModel, max_concurrent: int, num_threads: int | None = None) -> Engine:
    """The fastest engine that answers as the model itself does. It has generated its first tokens already."""
    reason = why_not_batched(loaded) or BATCHING.problem()
    if reason is None:
        attention = loaded.model.config._attn_implementation
        try:
            return await _tried_batching(loaded, max_concurrent, num_threads)
        except _DOES_NOT_FIT as error:
            reason = f"{type(error).__name__}: {error}"
            loaded.model.set_attn_implementation(attention)
    log.warning("no continuous batching, serving one sequence per thread: %s", reason)
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


async def _tried_batching(loaded: LoadedModel, max_concurrent: int, num_threads: int | None) -> Engine:
    from jupyter_llmcloud.inference.engines.continuous_batching import ContinuousBatchingEngine

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
    engine = await asyncio.to_thread(ContinuousBatchingEngine, loaded, plan, max_concurrent, num_threads)
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
