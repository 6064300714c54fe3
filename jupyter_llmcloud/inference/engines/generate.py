"""The engine of last resort: `model.generate`, one sequence per thread. Slow with many, right for any model.

Encoder-decoder models, state-space models and models with an attention of their own cannot join a packed
batch; here each sequence keeps the cache that its own model class makes.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from jupyter_llmcloud.inference.engines.base import (
    EngineError,
    EngineStats,
    FinishReason,
    Generation,
    TokenLogprob,
    TokenStream,
)
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.sampling import FollowedConstraint, Row, Sampler, ends_of, logprobs_of
from jupyter_llmcloud.inference.engines.trial import Lockstep

log = logging.getLogger(__name__)

MAX_PARALLEL = 4


class _Cancelled(Exception):
    """Raised inside `generate` to leave it at the next step."""


@dataclass(eq=False)
class _Sequence:
    generation: Generation
    loop: asyncio.AbstractEventLoop
    stream: TokenStream
    cancelled: threading.Event = field(default_factory=threading.Event)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_delivered: int = 0
    num_logprobs_delivered: int = 0
    ends: frozenset[int] = frozenset()
    never: frozenset[int] = frozenset()
    constraint: FollowedConstraint | None = None


class _Gate:
    """Sequences run together, or a change is made alone; who waits to be alone lets nobody else in."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # also of what the sequences count
        self._condition = threading.Condition(self.lock)
        self._num_running = 0
        self._num_alone = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A sequence runs inside."""
        with self._condition:
            self._condition.wait_for(lambda: not self._num_alone)
            self._num_running += 1
        try:
            yield
        finally:
            with self._condition:
                self._num_running -= 1
                self._condition.notify_all()

    def alone(self, change: Callable[[], None]) -> None:
        """Call `change` while no sequence runs."""
        with self._condition:
            self._num_alone += 1
            try:
                self._condition.wait_for(lambda: not self._num_running)
                change()
            finally:
                self._num_alone -= 1
                self._condition.notify_all()


class _SamplerProcessor(LogitsProcessor):
    """The last logits processor of a `generate`: our sampler, and the place where each token is seen."""

    def __init__(self, engine: GenerateEngine, sequence: _Sequence) -> None:
        self._engine = engine
        self._sequence = sequence
        self._sampler = Sampler(engine.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sequence = self._sequence
        if self._engine.lockstep is not None:
            self._engine.lockstep.arrive()
        if sequence.cancelled.is_set():
            raise _Cancelled
        wanted = sequence.generation
        banned = sequence.never | (sequence.ends if len(sequence.tokens) < wanted.min_tokens else frozenset())
        row = Row(wanted.sampling, sequence.tokens, sequence.logprobs, wanted.prompt, banned, sequence.constraint)
        chosen = self._sampler.scores(scores.float(), [row])
        sequence.tokens.append(int(chosen[0].argmax()))
        self._engine.count_token()
        if sequence.generation.incremental:
            self._engine.deliver(sequence, finished=False)
        return chosen


class GenerateEngine:
    """A few sequences at a time, each in its own thread; the others wait.

    Attributes:
        num_parallel: how many run at once.
        lockstep: of a trial, in which the sequences take each step together.
    """

    name = "generate"
    unsupported = frozenset({"adapter"})

    def __init__(self, loaded: LoadedModel, num_parallel: int = MAX_PARALLEL, num_threads: int | None = None) -> None:
        self.context_length = loaded.context_length
        self.num_parallel = min(MAX_PARALLEL, num_parallel)
        self.num_threads = num_threads or torch.get_num_threads()
        self.lockstep: Lockstep | None = None
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._loaded = loaded
        self._plain = _plain_configuration(loaded)
        self._sequences: set[_Sequence] = set()
        self._num_tokens = 0
        self._gate = _Gate()
        self._threads = ThreadPoolExecutor(self.num_parallel, thread_name_prefix="generate")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self._loaded.model.device
        return device

    def submit(self, generation: Generation) -> TokenStream:
        """Begin a sequence as soon as a thread is free."""
        if self.failure is not None:
            raise EngineError(self.failure)
        stream = TokenStream(lambda: self._cancel(sequence))
        sequence = _Sequence(generation, asyncio.get_running_loop(), stream, ends=ends_of(generation, self._loaded.eos))
        sequence.never = _never(self._loaded)
        if generation.constraint is not None:
            sequence.constraint = FollowedConstraint(generation.constraint)
        self._sequences.add(sequence)
        self._threads.submit(self._run, sequence)
        return stream

    def stats(self) -> EngineStats:
        """The gauges now."""
        return EngineStats(num_active=len(self._sequences), num_tokens=self._num_tokens)

    async def close(self) -> None:
        """Cancel every sequence and wait for the threads."""
        self.failure = self.failure or "the engine was closed"
        for sequence in list(self._sequences):
            self._end(sequence, EngineError(self.failure))
            sequence.cancelled.set()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    async def change_weights(self, change: Callable[[], None]) -> None:
        """As `reload.TakesWeights`: sequences that run end first, those that wait begin with the new weights."""
        await asyncio.to_thread(self._gate.alone, change)

    def count_token(self) -> None:
        """Called by the threads, once for every token."""
        with self._gate.lock:
            self._num_tokens += 1
        # Those that run share the cores: with all of them each, they would wait for one another.
        num_threads = max(1, self.num_threads // max(1, min(len(self._sequences), self.num_parallel)))
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)

    def deliver(self, sequence: _Sequence, *, finished: bool) -> None:
        """Called by the threads: hand what is new to the event loop."""
        tokens = sequence.tokens[sequence.num_delivered :]
        logprobs = sequence.logprobs[sequence.num_logprobs_delivered :]
        sequence.num_delivered, sequence.num_logprobs_delivered = len(sequence.tokens), len(sequence.logprobs)
        last = sequence.tokens[-1] if sequence.tokens else None
        reason: FinishReason | None = ("stop" if last in sequence.ends else "length") if finished else None
        sequence.loop.call_soon_threadsafe(sequence.stream.push, tokens, logprobs, reason)
        if finished:
            sequence.loop.call_soon_threadsafe(self._sequences.discard, sequence)

    def _run(self, sequence: _Sequence) -> None:
        try:
            if sequence.cancelled.is_set():
                return
            with self._gate.together():
                if sequence.generation.score_prompt:
                    self._score(sequence)
                if sequence.generation.max_tokens:
                    self._generate(sequence)
            self.deliver(sequence, finished=True)
        except _Cancelled:
            pass
        except Exception as error:
            log.exception("generation failed")
            failure = EngineError(f"generation failed: {type(error).__name__}: {error}")
            sequence.loop.call_soon_threadsafe(self._end, sequence, failure)
        finally:
            if self.lockstep is not None:
                self.lockstep.leave()

    @torch.inference_mode()
    def _score(self, sequence: _Sequence) -> None:
        """The log probabilities of the prompt's tokens from the second one on, by a forward pass without a cache."""
        prompt = list(sequence.generation.prompt)
        if self._loaded.is_encoder_decoder:
            raise EngineError("an encoder reads the prompt, so its tokens have no log probabilities")
        if len(prompt) > 1:
            ids = torch.tensor([prompt], device=self.device)
            logits = self._loaded.model(input_ids=ids, use_cache=False).logits[0, :-1]
            count = sequence.generation.sampling.num_logprobs or 0
            sequence.logprobs += logprobs_of(logits, ids[0, 1:], [count] * (len(prompt) - 1))

    def _generate(self, sequence: _Sequence) -> None:
        prompt = torch.tensor([list(sequence.generation.prompt)], device=self.device)
        configuration = copy.deepcopy(self._plain)
        configuration.eos_token_id = sorted(sequence.ends) or -1  # None: what the model has
        configuration.max_new_tokens = sequence.generation.max_tokens
        # What ours leaves open, the library takes from the model's own: beams, penalties, a forced end.
        model = copy.copy(self._loaded.model)
        model.generation_config = self._plain
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=configuration,
            logits_processor=[_SamplerProcessor(self, sequence)],
        )

    def _cancel(self, sequence: _Sequence) -> None:
        sequence.cancelled.set()
        self._sequences.discard(sequence)

    def _end(self, sequence: _Sequence, error: Exception) -> None:
        self._sequences.discard(sequence)
        sequence.stream.fail(error)


def _plain_configuration(loaded: LoadedModel) -> GenerationConfig:
    """What the architecture needs to start, keep and end a sequence, and none of the checkpoint's sampling."""
    own: Any = loaded.model.generation_config
    return GenerationConfig(
        do_sample=False,
        eos_token_id=sorted(loaded.eos) or None,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else min(loaded.eos, default=0),
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        forced_bos_token_id=own.forced_bos_token_id,
        use_cache=own.use_cache,
        cache_implementation=own.cache_implementation,
    )


def _never(loaded: LoadedModel) -> frozenset[int]:
    """Tokens that are no part of any answer: Marian's padding token has a score that is often the largest."""
    own: Any = loaded.model.generation_config
    words = [word[0] for word in own.bad_words_ids or () if len(word) == 1]
    return frozenset((*words, *(own.suppress_tokens or ()))) if loaded.is_encoder_decoder else frozenset()
