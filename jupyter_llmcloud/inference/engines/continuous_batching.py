"""transformers' continuous batching, with our own sampling, admission and cancellation.

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
    BatchingEngine,
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
from jupyter_llmcloud.inference.engines.sampling import FollowedConstraint, Row, Sampler, ends_of

log = logging.getLogger(__name__)

_GREEDY = Sampling(temperature=0.0)
_STOP_S = 30.0


@dataclass(slots=True)
class _ManagedSequence:
    """A sequence that goes on: what the sampler must know of it, and what was delivered already.

    Attributes:
        tokens: those that are known to have been generated.
        num_before: how many of them the manager was given as part of the prompt.
    """

    generation: Generation
    stream: TokenStream
    ends: frozenset[int]
    constraint: FollowedConstraint | None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_before: int = 0
    num_delivered: int = 0

    def note(self, tokens: list[int]) -> None:
        """So far these were generated."""
        if len(tokens) > len(self.tokens):
            self.tokens = tokens

    def finish_reason(self, tokens: list[int]) -> FinishReason:
        """Why it has ended with these."""
        return "stop" if tokens and tokens[-1] in self.ends else "length"

    @property
    def length(self) -> int:
        """Tokens that are kept of it, the next one included."""
        return len(self.generation.prompt) + len(self.tokens) + 1

    def begin_again(self) -> list[int]:
        """The prompt with which another manager goes on."""
        self.num_before = len(self.tokens)
        del self.logprobs[self.num_before :]
        return [*self.generation.prompt, *self.tokens]


class _SamplerList(ContinuousBatchingLogitsProcessorList):
    """Stands where the library keeps its list of logits processors, and applies our sampler instead."""

    def __init__(self, sampler: Sampler, sequences: dict[str, _ManagedSequence], on_step: Callable[[], None]) -> None:
        super().__init__(LogitsProcessorList())
        self._sampler = sampler
        self._sequences = sequences
        self.on_step = on_step
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
        self.on_step()
        return arg_storage

    def _row(self, state: Any) -> Row:
        sequence = self._sequences.get(state.request_id)
        if sequence is None:  # cancelled a moment ago: its token goes nowhere
            return Row(_GREEDY)
        # Short of pages, the library starts a sequence again with its tokens as part of the prompt.
        again = state.initial_tokens[len(sequence.generation.prompt) :]
        generated = again + state.generated_tokens
        sequence.note(generated)
        wanted = sequence.generation
        banned = sequence.ends if len(generated) < wanted.min_tokens else ()
        return Row(wanted.sampling, generated, sequence.logprobs, wanted.prompt, banned, sequence.constraint)

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        self.num_tokens += len(self._rows)
        return self._sampler.scores(scores, self._rows)


class ContinuousBatchingEngine(BatchingEngine):
    """Many sequences in one batch that any may join or leave at every step.

    Its cache begins small. When the sequences that are there need more, the library's manager is stopped between two
    steps and replaced by one with a larger cache, in which they go on: what was generated is part of the prompt then.

    Attributes:
        budget: the cache as large as it may become.
    """

    name = "continuous-batching"
    unsupported = frozenset({"score_prompt", "adapter"})

    def __init__(
        self, loaded: LoadedModel, budget: CachePlan, max_concurrent: int, num_threads: int | None = None
    ) -> None:
        super().__init__(budget.context_length, max_concurrent, num_threads or torch.get_num_threads())
        self.budget = budget
        self._loaded = loaded
        self._plan = budget.at_first(loaded.model.device.type)
        self._sequences: dict[str, _ManagedSequence] = {}
        self._growing: asyncio.Task[None] | None = None
        self._choosing = _SamplerList(Sampler(loaded.model.device), self._sequences, lambda: None)
        self._manager: ContinuousBatchingManager | None = self._started(self._plan)

    def _started(self, plan: CachePlan) -> ContinuousBatchingManager:
        manager = _manager(self._loaded, plan, self.num_parallel)
        manager.logit_processor = self._choosing
        manager.warmup()  # allocates here and now, so that a lack of memory is raised to the caller
        manager.start()
        return manager

    def submit(self, generation: Generation) -> TokenStream:
        """Begin a sequence; it waits inside the engine while the batch is full."""
        self.check_alive()
        request_id = uuid.uuid4().hex
        stream = TokenStream(lambda: self._cancel(request_id))
        constraint = None if generation.constraint is None else FollowedConstraint(generation.constraint)
        self._sequences[request_id] = _ManagedSequence(
            generation, stream, ends_of(generation, self._loaded.eos), constraint
        )
        if generation.max_tokens == 0:
            self._sequences.pop(request_id)
            stream.push([], [], "length")
            return stream
        self._watch_the_cache()
        self._grow_if_needed()
        if self._growing is None and not self._add(request_id):
            self._forget(request_id)
            raise EngineError(self._fail("the generation thread has stopped"))
        return stream

    def _add(self, request_id: str) -> bool:
        """Give a sequence to the manager; whether it took it. One for which there is no memory fails, and no other."""
        manager, sequence = self._manager, self._sequences[request_id]
        assert manager is not None
        prompt = sequence.begin_again()
        room = self.context_length - len(sequence.generation.prompt)
        if min(sequence.generation.max_tokens, room) <= sequence.num_before:
            self._forget(request_id)
            sequence.stream.fail(
                EngineError(f"memory holds sequences of {self.context_length} tokens, and no longer ones")
            )
            return True
        # The handler comes first: a token that finds no handler is lost.
        manager.register_result_handler(request_id, lambda output: self._deliver(manager, request_id, output))
        accepted = manager.add_request(
            prompt,
            request_id=request_id,
            max_new_tokens=min(sequence.generation.max_tokens, room) - sequence.num_before,
            streaming=sequence.generation.incremental,
            eos_token_id=sorted(sequence.ends) or -1,
        )
        return accepted is not None

    def stats(self) -> EngineStats:
        """The gauges now."""
        return EngineStats(
            num_active=len(self._sequences),
            num_tokens=self._choosing.num_tokens,
            num_cache_tokens=self._plan.num_tokens,
            max_cache_tokens=self.budget.num_tokens,
            cache_bytes=self._plan.num_bytes,
            max_cache_bytes=self.budget.num_bytes,
        )

    async def close(self) -> None:
        """Stop the generation thread; sequences that go on fail."""
        if self.failure is None:
            self.failure = "the engine was closed"
        if self._growing is not None:
            await asyncio.wait([self._growing])
        await self._stop_manager()
        self._fail_sequences(self.failure)

    async def _stop_manager(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            await asyncio.to_thread(manager.stop, block=True, timeout=_STOP_S, hard_stop=True)

    def _fail_sequences(self, reason: str) -> None:
        for request_id in list(self._sequences):
            self._sequences[request_id].stream.fail(EngineError(reason))
            self._forget(request_id)

    # --- the cache grows ---

    def _watch_the_cache(self) -> None:
        """Have the generation thread look, at each step, whether the cache is large enough, and use its threads."""
        loop = asyncio.get_running_loop()

        def look() -> None:
            if torch.get_num_threads() != self.num_threads:
                torch.set_num_threads(self.num_threads)
            if self._growing is None and self._is_small():
                loop.call_soon_threadsafe(self._grow_if_needed)

        self._choosing.on_step = look

    def _num_needed(self) -> int:
        # A copy: the generation thread asks while sequences come and go.
        return sum(self._plan.pages(sequence.length) for sequence in list(self._sequences.values()))

    def _is_small(self) -> bool:
        """Whether it should grow now: the last quarter is for the steps until it has."""
        return self._plan.num_pages < self.budget.num_pages and 4 * self._num_needed() > 3 * self._plan.num_pages

    def _grow_if_needed(self) -> None:
        if self._growing is None and self.failure is None and self._is_small():
            self._growing = asyncio.ensure_future(self._grow())

    async def _grow(self) -> None:
        try:
            await self._stop_manager()
            await self._replace_manager()
        except Exception as error:  # of a library, in the midst of allocating
            log.exception("the cache could not grow")
            self._fail_sequences(self._fail(f"the cache could not grow: {type(error).__name__}: {error}"))
        finally:
            self._growing = None
        self._grow_if_needed()

    async def change_weights(self, change: Callable[[], None]) -> None:
        """As `reload.TakesWeights`: the manager is stopped for that, and the next one reads what goes on again."""
        while self._growing is not None:
            await asyncio.wait([self._growing])
        self.check_alive()
        self._growing = asyncio.ensure_future(self._change_weights(change))
        await asyncio.shield(self._growing)
        self.check_alive()

    async def _change_weights(self, change: Callable[[], None]) -> None:
        try:
            await self._stop_manager()
            await asyncio.to_thread(change)
            self._manager = await asyncio.to_thread(self._started, self._plan)
            if not all(self._add(request_id) for request_id in list(self._sequences)):
                raise RuntimeError("the generation thread has stopped")
        except Exception as error:
            log.exception("the weights could not be changed")
            self._fail_sequences(self._fail(f"the weights could not be changed: {type(error).__name__}: {error}"))
        finally:
            self._growing = None
        self._grow_if_needed()

    async def _replace_manager(self) -> None:
        device, before = self._loaded.model.device, self._plan
        wanted = max(2 * before.num_pages, 2 * self._num_needed())
        self._plan = self.budget.with_pages(min(wanted, self.budget.affordable(before.num_pages, device)))
        if self._plan.num_pages < min(wanted, self.budget.num_pages):
            self.budget = self._plan  # others have taken the memory: this is all there is
            self.context_length = min(self.context_length, self._plan.longest)
        log.info("the cache grows from %d to %d tokens", before.num_tokens, self._plan.num_tokens)
        self._manager = await asyncio.to_thread(self._started, self._plan)
        if not all(self._add(request_id) for request_id in list(self._sequences)):
            raise RuntimeError("the generation thread has stopped")

    # --- what the manager tells ---

    def _deliver(self, manager: ContinuousBatchingManager, request_id: str, output: Any) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if output.error is not None:
            if manager is self._manager:  # one that was stopped fails what goes on in the next one
                self._forget(request_id)
                sequence.stream.fail(EngineError(f"generation failed: {output.error}"))
                self._notice_death(manager, output.error)
            return
        tokens = sequence.tokens[: sequence.num_before] + output.generated_tokens
        sequence.note(tokens)
        reason = sequence.finish_reason(tokens) if output.is_finished() else None
        seen, sequence.num_delivered = sequence.num_delivered, len(tokens)
        if reason is not None:
            self._forget(request_id)
        sequence.stream.push(tokens[seen:], sequence.logprobs[seen : len(tokens)], reason)

    def _notice_death(self, manager: ContinuousBatchingManager, error: str) -> None:
        # The thread delivers the failures a moment before its own end: ask for its status, not its life.
        if manager.background_thread_status.local_status and self.failure is None:
            self._fail(f"the generation thread has stopped: {error}")

    def _fail(self, reason: str) -> str:
        log.error("%s", reason)
        self.failure = reason
        self.on_failure()
        return reason

    def _cancel(self, request_id: str) -> None:
        self._forget(request_id)
        if self._manager is not None:
            self._manager.cancel_request(request_id)

    def _forget(self, request_id: str) -> None:
        self._sequences.pop(request_id, None)
        if self._manager is None:
            return
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
