"""What an engine is: token ids and sampling in, a stream of token ids out. No torch and no HTTP here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from jupyter_llmcloud.errors import LLMCloudError

FinishReason = Literal["stop", "length"]


class EngineError(LLMCloudError):
    """The engine could not go on with a request; says why."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The defaults are OpenAI's.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: keep the smallest set of tokens that holds this much probability.
        top_k: keep this many tokens; 0 keeps all.
        seed: the same seed gives the same tokens, whatever else is in the batch.
        min_p: keep tokens at least so likely, relative to the likeliest one; 0 keeps all.
        presence_penalty, frequency_penalty: taken from the score of tokens that were generated before.
        repetition_penalty: scores of tokens of the prompt and of the answer are divided by it where they are positive
            and multiplied where they are negative (Keskar et al. 2019, CTRL, section 4.1); 1 changes nothing.
        logit_bias: added to the scores of these tokens.
        num_logprobs: report the log probability of each token and of this many likeliest ones.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None


class TokenConstraint(Protocol):
    """A grammar that the tokens of one sequence must follow. Used by one engine thread, for one sequence."""

    def allowed(self) -> bytes:
        """The tokens that may come next: bit i % 8 of byte i // 8 (the lowest bit first) is set for token i."""
        ...

    def accept(self, token: int) -> None:
        """A token was chosen."""
        ...


@dataclass(frozen=True, slots=True)
class Generation:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: how many tokens at most; 0 only scores the prompt.
        sampling: how they are chosen.
        incremental: deliver every step; otherwise everything at the end (cheaper).
        min_tokens: no end-of-sequence or stop token before so many tokens were generated.
        ignore_eos: an end-of-sequence token is a token like others.
        stop_token_ids: tokens that end the sequence like an end-of-sequence token.
        constraint: what the tokens must follow.
        score_prompt: the first batch tells the log probabilities of the prompt's tokens from the second one on
            (`sampling.num_logprobs` must be set).
        adapter: the name of the adapter to answer with; "" is the model itself.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    incremental: bool = True
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    constraint: TokenConstraint | None = None
    score_prompt: bool = False
    adapter: str = ""


class TokenLogprob(NamedTuple):
    """The log probability of a chosen token, before temperature and filters, and of the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenBatch(NamedTuple):
    """What one or more steps gave. With finish reason "stop" the last token is an end-of-sequence token."""

    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and counters of an engine.

    Attributes:
        num_active: sequences that were submitted and have neither ended nor been closed.
        num_tokens: tokens generated since the start, those nobody waited for included.
        num_cache_tokens, max_cache_tokens: tokens that the cache of keys and values holds now, and may hold; 0: an
            engine whose sequences have one each.
        cache_bytes, max_cache_bytes: what it takes for that.
        prefix_bytes: of cache_bytes, what is kept for prompts that begin alike, and given up first.
    """

    num_active: int
    num_tokens: int
    num_cache_tokens: int = 0
    max_cache_tokens: int = 0
    cache_bytes: int = 0
    max_cache_bytes: int = 0
    prefix_bytes: int = 0


class TokenStream:
    """The tokens of one sequence, filled by an engine and read by one task, both in the same event loop.

    Steps that were not read yet are joined: a slow reader gets larger pieces, not a longer queue of them.

    Attributes:
        num_reused: tokens of the prompt whose keys and values were there from earlier ones, known with the first
            batch; None: the engine does not tell.
    """

    def __init__(self, on_close: Callable[[], None]) -> None:
        self.num_reused: int | None = None
        self._on_close = on_close
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish_reason: FinishReason | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._exhausted = False
        self._wake = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the engine will add nothing more."""
        return self._ended

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], finish_reason: FinishReason | None) -> None:
        """Called by the engine: add what a step gave."""
        if self._ended:
            return
        self._tokens.extend(tokens)
        self._logprobs.extend(logprobs)
        if finish_reason is not None:
            self._finish_reason = finish_reason
            self._ended = True
        self._wake.set()

    def fail(self, error: BaseException) -> None:
        """Called by the engine: the reader gets `error` after the tokens that came before it."""
        if not self._ended:
            self._error = error
            self._ended = True
            self._wake.set()

    def close(self) -> None:
        """Called by the reader: no more tokens are wanted. The engine stops within one step. Idempotent."""
        self._exhausted = True
        if not self._ended:
            self._ended = True
            self._on_close()
        self._wake.set()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenBatch:
        while not (self._tokens or self._ended):
            self._wake.clear()
            await self._wake.wait()
        if self._exhausted:
            raise StopAsyncIteration
        if self._error is not None and not self._tokens:
            self._exhausted = True
            raise self._error
        return self._take()

    def _take(self) -> TokenBatch:
        batch = TokenBatch(self._tokens, self._logprobs, self._finish_reason)
        self._tokens, self._logprobs = [], []
        self._exhausted = self._ended and self._error is None
        return batch


class Engine(Protocol):
    """Generates tokens for many sequences at once. Used from one event loop.

    Attributes:
        name: what to call it in logs and statistics.
        unsupported: names of fields of `Generation` and `Sampling` that it cannot honour.
        context_length: how many tokens prompt and answer may have together.
        num_parallel: how many sequences take their steps at the same time; the others wait.
        num_threads: CPU threads for each step; may be changed at any time.
        failure: None, or why the engine can generate nothing any more.
        on_failure: called once, in the event loop, when `failure` was set.
    """

    name: str
    unsupported: frozenset[str]
    context_length: int
    num_parallel: int
    num_threads: int
    failure: str | None
    on_failure: Callable[[], None]

    def submit(self, generation: Generation) -> TokenStream:
        """Begin a sequence. Returns at once; raises `EngineError` when the engine has failed or is closed."""
        ...

    def stats(self) -> EngineStats:
        """The gauges now."""
        ...

    async def close(self) -> None:
        """Fail every sequence that goes on and give back the memory and threads."""
        ...


class BatchingEngine:
    """What the engines that share each step among all sequences begin as; their attributes are those of `Engine`.

    Args:
        context_length: how many tokens prompt and answer may have together.
        num_parallel: sequences in one step.
        num_threads: CPU threads of a step.
    """

    def __init__(self, context_length: int, num_parallel: int, num_threads: int) -> None:
        self.context_length = context_length
        self.num_parallel = num_parallel
        self.num_threads = num_threads
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None

    def check_alive(self) -> None:
        """Raise EngineError when it can generate nothing any more."""
        if self.failure is not None:
            raise EngineError(self.failure)
