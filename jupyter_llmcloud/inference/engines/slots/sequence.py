"""A sequence that is being generated, as the generation thread sees it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from jupyter_llmcloud.inference.engines.base import FinishReason, Generation, TokenLogprob, TokenStream
from jupyter_llmcloud.inference.engines.sampling import FollowedConstraint, Row
from jupyter_llmcloud.inference.engines.slots.kv_slots import SlotGroup
from jupyter_llmcloud.inference.engines.slots.speculation import Drafts


@dataclass(eq=False, slots=True)
class Sequence:
    """What was asked, what was generated, and where its keys and values are.

    Attributes:
        generation: what was asked.
        stream: where tokens go, in the event loop `loop`.
        ends: the tokens that end it.
        max_tokens: how many tokens it may get, given the context.
        tokens: prompt, then what was generated.
        num_cached: of so many tokens, from the first on, the keys and values are in the slot.
        group, row: the slot; None while it waits.
        number: of the sequences that were given a slot, which one this is.
        last_known: the newest that had one when this one got its first token.
        was_unsound: once its scores were no numbers.
        cancelled: nobody waits for it any more; set by the event loop.
        logprobs: those that were asked for: of the prompt's tokens, then of the generated ones.
        drafts: guesses of what comes next.
    """

    generation: Generation
    stream: TokenStream
    loop: asyncio.AbstractEventLoop
    ends: frozenset[int]
    max_tokens: int
    tokens: list[int]
    num_cached: int = 0
    group: SlotGroup | None = None
    row: int = -1
    number: int = 0
    last_known: int = 0
    was_unsound: bool = False
    cancelled: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    drafts: Drafts = field(default_factory=Drafts)
    _constraint: FollowedConstraint | None = None
    _is_greedy: bool = False
    _num_told: int = 0
    _num_logprobs_told: int = 0

    def __post_init__(self) -> None:
        if self.generation.constraint is not None:
            self._constraint = FollowedConstraint(self.generation.constraint)
        sampling = self.generation.sampling
        self._is_greedy = Row(sampling, constraint=self._constraint).is_plain and sampling.num_logprobs is None

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.generation.prompt)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that go through the model before the next one can be chosen."""
        return len(self.tokens) - self.num_cached

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken and nothing else is asked."""
        return self._is_greedy and (not self.generation.min_tokens or self.num_generated >= self.generation.min_tokens)

    @property
    def is_scored(self) -> bool:
        """Whether the tokens that are read now are those of a prompt whose log probabilities are wanted."""
        return self.generation.score_prompt and self.num_generated == 0

    def begin_again(self) -> None:
        """It has lost its slot: all of it is to be read again, with its answer, when there is one."""
        self.num_cached = 0
        if self.is_scored:
            self.logprobs.clear()

    def sampler_row(self) -> Row:
        """What the sampler needs to know to choose the next token."""
        banned = self.ends if self.num_generated < self.generation.min_tokens else ()
        return Row(
            self.generation.sampling, self.generated, self.logprobs, self.generation.prompt, banned, self._constraint
        )

    def news(self) -> tuple[list[int], list[TokenLogprob]]:
        """The tokens and log probabilities that were not told yet."""
        tokens = self.tokens[self.num_prompt + self._num_told :]
        logprobs = self.logprobs[self._num_logprobs_told :]
        self._num_told += len(tokens)
        self._num_logprobs_told += len(logprobs)
        return tokens, logprobs

    @property
    def generated(self) -> list[int]:
        """The answer so far."""
        return self.tokens[self.num_prompt :]

    def finish_reason(self) -> FinishReason | None:
        """Whether it has ended, looked at after each token."""
        if self.num_generated and self.tokens[-1] in self.ends and self.num_generated > self.generation.min_tokens:
            return "stop"
        return "length" if self.num_generated >= self.max_tokens else None
