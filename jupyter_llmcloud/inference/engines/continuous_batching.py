"""The default engine: transformers' continuous batching, with our own sampling, admission and cancellation.

The library's manager runs one thread; this engine feeds it and turns its callbacks into token streams. What
it must not be left to decide: the size of the cache (it would take 60 % of the machine's memory), the
sampling (its knobs sort the vocabulary twice and know no seed), and request ids (a clash would mix two
sequences).
"""

from __future__ import annotations

import asyncio
import logging
import queue
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, ContinuousBatchingManager, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from jupyter_llmcloud.inference.engines.base import (
    EngineError,
    EngineStats,
    FinishReason,
    Generation,
    Sampling,
    TokenLogprob,
    TokenStream,
)
from jupyter_llmcloud.inference.engines.kv_cache import CachePlan
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.sampling import Row, Sampler

log = logging.getLogger(__name__)

_GREEDY = Sampling(temperature=0.0)
_STOP_S = 30.0


@dataclass(slots=True)
class _Sequence:
    """A sequence that goes on: what the sampler must know of it, and what was delivered already."""

    generation: Generation
    stream: TokenStream
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_delivered: int = 0


class _Choosing(ContinuousBatchingLogitsProcessorList):
    """Stands where the library keeps its list of logits processors, and applies our sampler instead."""

    def __init__(self, sampler: Sampler, sequences: dict[str, _Sequence]) -> None:
        super().__init__(LogitsProcessorList())
        self._sampler = sampler
        self._sequences = sequences
        self._rows: list[Row] = []
        self.num_tokens = 0
        self.do_processing = True

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Nothing to check: parameters come from the sequence itself."""

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """No parameter travels by tensor."""

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Called before each step: note which sequences get a token, in the order of the logits."""
        self._rows = [self._row(request.state) for request in requests_in_batch if request.has_new_token]
        return arg_storage

    def _row(self, state: Any) -> Row:
        sequence = self._sequences.get(state.request_id)
        if sequence is None:  # cancelled a moment ago: its token goes nowhere
            return Row(_GREEDY)
        # Short of pages, the library starts a sequence again with its tokens as part of the prompt.
        again = state.initial_tokens[len(sequence.generation.prompt) :]
        return Row(sequence.generation.sampling, again + state.generated_tokens, sequence.logprobs)

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        self.num_tokens += len(self._rows)
        return self._sampler.scores(scores, self._rows)


class ContinuousBatchingEngine:
    """Many sequences in one batch that any may join or leave at every step."""

    name = "continuous-batching"

    def __init__(self, loaded: LoadedModel, plan: CachePlan, max_concurrent: int) -> None:
        self.context_length = plan.context_length
        self.num_parallel = max_concurrent
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._eos = loaded.eos
        self._sequences: dict[str, _Sequence] = {}
        self._manager = _manager(loaded, plan, max_concurrent)
        self._choosing = _Choosing(Sampler(loaded.model.device), self._sequences)
        self._manager.logit_processor = self._choosing
        self._manager.warmup()  # allocates here and now, so that a lack of memory is raised to the caller
        self._manager.start()

    def submit(self, generation: Generation) -> TokenStream:
        """Begin a sequence; it waits inside the engine while the batch is full."""
        if self.failure is not None:
            raise EngineError(self.failure)
        request_id = uuid.uuid4().hex
        stream = TokenStream(lambda: self._cancel(request_id))
        self._sequences[request_id] = _Sequence(generation, stream)
        # The handler comes first: a token that finds no handler is lost.
        self._manager.register_result_handler(request_id, lambda output: self._deliver(request_id, output))
        accepted = self._manager.add_request(
            list(generation.prompt),
            request_id=request_id,
            max_new_tokens=generation.max_tokens,
            streaming=generation.incremental,
            eos_token_id=sorted(self._eos) or -1,
        )
        if accepted is None:
            self._forget(request_id)
            raise EngineError(self._fail("the generation thread has stopped"))
        return stream

    def stats(self) -> EngineStats:
        """The gauges now."""
        return EngineStats(num_active=len(self._sequences), num_tokens=self._choosing.num_tokens)

    async def close(self) -> None:
        """Stop the generation thread; sequences that go on fail."""
        if self.failure is None:
            self.failure = "the engine was closed"
        await asyncio.to_thread(self._manager.stop, block=True, timeout=_STOP_S, hard_stop=True)
        for request_id in list(self._sequences):
            self._sequences[request_id].stream.fail(EngineError(self.failure))
            self._forget(request_id)

    def _deliver(self, request_id: str, output: Any) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if output.error is not None:
            self._forget(request_id)
            sequence.stream.fail(EngineError(f"generation failed: {output.error}"))
            self._notice_death(output.error)
            return
        seen, tokens = sequence.num_delivered, output.generated_tokens
        reason = self._finish_reason(tokens) if output.is_finished() else None
        sequence.num_delivered = len(tokens)
        if reason is not None:
            self._forget(request_id)
        sequence.stream.push(tokens[seen:], sequence.logprobs[seen : len(tokens)], reason)

    def _finish_reason(self, tokens: list[int]) -> FinishReason:
        return "stop" if tokens and tokens[-1] in self._eos else "length"

    def _notice_death(self, error: str) -> None:
        # The thread delivers the failures a moment before its own end: ask for its status, not its life.
        if self._manager.background_thread_status.local_status and self.failure is None:
            self._fail(f"the generation thread has stopped: {error}")

    def _fail(self, reason: str) -> str:
        log.error("%s", reason)
        self.failure = reason
        self.on_failure()
        return reason

    def _cancel(self, request_id: str) -> None:
        self._forget(request_id)
        self._manager.cancel_request(request_id)

    def _forget(self, request_id: str) -> None:
        self._sequences.pop(request_id, None)
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(request_id, None)
        # Cancelling emits nothing, but a step under way still leaves its output in the shared queue.
        while True:
            try:
                router.output_queue.get_nowait()
            except queue.Empty:
                return


def _manager(loaded: LoadedModel, plan: CachePlan, max_concurrent: int) -> ContinuousBatchingManager:
    config = ContinuousBatchingConfig(
        page_size=plan.page_size,
        num_blocks=plan.num_pages,
        max_batch_tokens=plan.max_batch_tokens,
        max_requests_per_batch=max_concurrent,
        max_memory_percent=0.9,
        max_blocks_per_request=0,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
        allow_block_sharing=True,
    )
    # Not the checkpoint's own: it may ask for processors that the library drops with a warning.
    generation = GenerationConfig(do_sample=False, eos_token_id=sorted(loaded.eos) or -1, pad_token_id=0)
    manager: ContinuousBatchingManager = loaded.model.init_continuous_batching(generation, config)
    return manager
