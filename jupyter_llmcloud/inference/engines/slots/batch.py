"""The sequences of an engine and what each step does for them. Everything here runs in the generation thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from jupyter_llmcloud.inference.engines.base import EngineError, FinishReason, Sampling, TokenLogprob
from jupyter_llmcloud.inference.engines.sampling import Row, Sampler, likeliest, logprobs_of
from jupyter_llmcloud.inference.engines.slots.forward import ForwardPass
from jupyter_llmcloud.inference.engines.slots.kv_slots import CacheFull, KVSlots
from jupyter_llmcloud.inference.engines.slots.prefix_store import PrefixStore
from jupyter_llmcloud.inference.engines.slots.sequence import Sequence
from jupyter_llmcloud.inference.engines.slots.speculation import Speculation
from jupyter_llmcloud.inference.engines.slots.step import Part, make_step

_PLACED_AT_LEAST = 256
_SHORT_BURST = 1024  # tokens of prompts: about a second of a small model on one core


class Outcome(NamedTuple):
    """What a step gave a sequence: tokens, or the reason why it cannot go on."""

    sequence: Sequence
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    error: EngineError | None = None


class RunningBatch:
    """All sequences: those that run have a slot, the others wait for one.

    Attributes:
        waiting: in the order they came, those that lost their slot first.
        running: the oldest first.
        num_tokens: tokens generated so far.
    """

    def __init__(
        self, forward: ForwardPass, slots: KVSlots, prefixes: PrefixStore, num_parallel: int, max_batch_tokens: int
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_tokens = 0
        self._num_placed = 0
        self.speculation = Speculation()
        self._forward = forward
        self._slots = slots
        self._prefixes = prefixes
        self._num_parallel = num_parallel
        self._max_batch_tokens = max_batch_tokens
        self._sampler = Sampler(forward.model.device)
        self._outcomes: list[Outcome] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.running or self.waiting)

    def step(self) -> list[Outcome]:
        """Take one step with all that run; what it gave."""
        self._outcomes = []
        self._drop_cancelled()
        self._admit()
        parts = self._parts()
        if parts:
            self._run(parts)
        return self._outcomes

    def use(self, forward: ForwardPass) -> None:
        """Take the next steps with another forward pass of the same shape."""
        self._forward = forward

    def start_over(self) -> None:
        """Nobody's keys and values count any more: all that run are read again, with what they have generated."""
        while self.running:
            self._preempt()

    # --- who runs ---

    def _drop_cancelled(self) -> None:
        for sequence in [sequence for sequence in self.running if sequence.cancelled]:
            self._leave(sequence)
        if any(sequence.cancelled for sequence in self.waiting):
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.cancelled)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._num_parallel:
            sequence = self.waiting[0]
            if not self._place(sequence):
                if self.running:
                    return
                self.waiting.popleft()
                self._outcomes.append(Outcome(sequence, [], [], None, self._too_long(sequence)))
                continue
            self.waiting.popleft()
            self.running.append(sequence)
            self._num_placed += 1
            sequence.number = self._num_placed
            if not sequence.generation.score_prompt:
                self._prefixes.restore(sequence)
            if sequence.num_generated == 0:
                sequence.stream.num_reused = sequence.num_cached
            if sequence.num_pending == 1:
                self._begin_decoding(sequence)

    def _place(self, sequence: Sequence) -> bool:
        length = len(sequence.tokens)
        whole = length + sequence.max_tokens - sequence.num_generated
        for wanted in (min(whole, max(2 * length, _PLACED_AT_LEAST)), length + 1):
            if self._with_room(lambda wanted=wanted: self._slots.place(sequence, wanted), wanted):  # type: ignore[misc]
                return True
        return False

    def _with_room(self, take: Callable[[], None], num_tokens: int) -> bool:
        """Take a slot, and where there is none, let go of prefixes first; whether it was taken."""
        while True:
            try:
                take()
                return True
            except CacheFull:
                if not self._prefixes.give_back(self._slots.capacity_for(num_tokens) * self._slots.bytes_per_token):
                    return False

    def _preempt(self) -> None:
        """The youngest gives its slot to the others."""
        sequence = self.running[-1]
        self._leave(sequence)
        sequence.begin_again()
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._slots.free(sequence)
        self.running.remove(sequence)

    def _too_long(self, sequence: Sequence) -> EngineError:
        held = self._slots.budget // max(1, self._slots.bytes_per_token)
        return EngineError(
            f"memory holds sequences of about {held} tokens, and this one has {len(sequence.tokens)} and goes on"
        )

    # --- what they read ---

    def _parts(self) -> list[Part]:
        parts = []
        decoding = self._decoding()
        room = max(0, self._max_batch_tokens - len(decoding))
        may_guess = self.speculation.allows(len(decoding)) and len(decoding) == len(self.running)
        chosen = set(map(id, decoding))
        for sequence in list(self.running):
            if sequence.group is None:  # it has just lost its slot to an older one
                continue
            if sequence.num_pending == 1:
                if id(sequence) not in chosen:
                    continue
                guesses = self._guesses(sequence) if may_guess else []
                if self._holds(sequence, len(sequence.tokens) + len(guesses)):
                    parts.append(Part(sequence, [sequence.tokens[-1], *guesses], num_scored=1 + len(guesses)))
            elif room and self._holds(sequence, len(sequence.tokens)):
                parts.append(self._part_of_prompt(sequence, room))
                room -= len(parts[-1].tokens)
        return [part for part in parts if part.sequence.group is not None]

    def _decoding(self) -> list[Sequence]:
        """Those whose next token is computed in this step.

        One that has had its first token only lets the others of a short burst, which came with it, have theirs.
        """
        ready = [sequence for sequence in self.running if sequence.num_pending == 1]
        if len(ready) == len(self.running):
            return ready
        unread = [sequence for sequence in self.running if sequence.num_pending > 1]
        if sum(sequence.num_pending for sequence in unread) > _SHORT_BURST:
            return ready
        oldest = min(sequence.number for sequence in unread)
        return [one for one in ready if one.num_generated > 1 or one.last_known < oldest]

    def _holds(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make its slot large enough, whoever must give way; whether it has one."""
        group = sequence.group
        while group is not None and num_tokens > group.capacity:
            if self._with_room(lambda: self._slots.grow(sequence, num_tokens), num_tokens):
                return True
            if len(self.running) == 1:
                self._outcomes.append(Outcome(sequence, [], [], None, self._too_long(sequence)))
                self._leave(sequence)
                return False
            self._preempt()
            group = sequence.group
        return group is not None

    def _part_of_prompt(self, sequence: Sequence, room: int) -> Part:
        begin = sequence.num_cached
        tokens = sequence.tokens[begin : begin + room]
        is_last = begin + len(tokens) == len(sequence.tokens)
        wanted = len(tokens) if sequence.is_scored else int(is_last)
        return Part(sequence, tokens, num_scored=wanted)

    def _guesses(self, sequence: Sequence) -> list[int]:
        if not sequence.is_plain:
            return []
        left = sequence.max_tokens - sequence.num_generated - 1
        return sequence.drafts.propose(sequence.tokens, left)

    # --- what comes of it ---

    def _run(self, parts: list[Part]) -> None:
        step = make_step(parts, self._forward.model.device)
        began = time.perf_counter()
        logits = self._forward.run(step)
        unsound = _unsound(logits, step.parts)
        chosen = self._choose(logits, step.parts, unsound) if step.parts else []
        if all(part.num_scored == len(part.tokens) for part in parts):
            self.speculation.note(step.ids.shape[1], time.perf_counter() - began)
        self._note_read(parts)
        place = 0
        for part in step.parts:
            if part.sequence not in unsound:
                self._take(part, chosen[place : place + part.num_scored])
            place += part.num_scored
        if unsound:
            self._compute_again(unsound)

    def _compute_again(self, unsound: list[Sequence]) -> None:
        """What is no number may have been left in their slots by others; if it comes again, it is the model's own."""
        for sequence in unsound:
            self._leave(sequence)
            if sequence.was_unsound:
                self._outcomes.append(Outcome(sequence, [], [], None, EngineError(_NO_NUMBERS)))
            else:
                sequence.was_unsound = True
                sequence.begin_again()
                self.waiting.appendleft(sequence)
        self._prefixes.clear()
        self._slots.scrub()

    def _note_read(self, parts: list[Part]) -> None:
        """Their tokens have keys and values now. All are noted before any row moves: only that moves along."""
        sequences = [part.sequence for part in parts]
        for sequence, part in zip(sequences, parts, strict=True):
            sequence.num_cached = min(sequence.num_cached + len(part.tokens), len(sequence.tokens))
        for sequence in sequences:
            assert sequence.group is not None
            if sequence.num_pending == 0 and sequence.row >= sequence.group.num_decoding:
                self._begin_decoding(sequence)
                self._prefixes.keep(sequence)

    def _begin_decoding(self, sequence: Sequence) -> None:
        assert sequence.group is not None
        sequence.group.begin_decoding(sequence)

    def _choose(self, logits: torch.Tensor, parts: list[Part], unsound: list[Sequence]) -> list[int]:
        """The token that comes after each scored one."""
        rows: list[Row] = []
        for part in parts:
            if part.sequence in unsound:
                rows += [_PLAIN] * part.num_scored
                continue
            if part.sequence.is_scored:
                self._score(part, logits[len(rows) : len(rows) + part.num_scored])
            if part.sequence.is_plain:
                rows += [_PLAIN] * part.num_scored
            else:
                rows += [_PLAIN] * (part.num_scored - 1)
                chooses = _is_complete(part) and part.sequence.max_tokens > 0
                rows.append(part.sequence.sampler_row() if chooses else _PLAIN)
        if all(row is _PLAIN for row in rows):
            return likeliest(logits)
        return likeliest(self._sampler.scores(logits, rows))

    def _score(self, part: Part, logits: torch.Tensor) -> None:
        sequence = part.sequence
        following = sequence.tokens[part.before + 1 : min(part.before + part.num_scored + 1, sequence.num_prompt)]
        if following:
            tokens = torch.tensor(following, device=logits.device)
            count = sequence.generation.sampling.num_logprobs or 0
            sequence.logprobs += logprobs_of(logits[: len(following)], tokens, [count] * len(following))

    def _take(self, part: Part, chosen: list[int]) -> None:
        """Add what was chosen: of guesses, as many as were right, and the token after them."""
        sequence = part.sequence
        if not _is_complete(part):
            return
        new = chosen[-1:]
        if sequence.max_tokens == 0:
            new = []
        elif guesses := list(part.tokens[1:]) if part.num_scored == len(part.tokens) and sequence.is_plain else []:
            right = 0
            while right < len(guesses) and guesses[right] == chosen[right]:
                right += 1
            sequence.drafts.judge(len(guesses), right, self.speculation.needed(len(self.running), len(guesses)))
            new = chosen[: right + 1]
        self._extend(sequence, new)

    def _extend(self, sequence: Sequence, new: list[int]) -> None:
        reason = sequence.finish_reason()
        if not sequence.num_generated:
            sequence.last_known = self._num_placed
        for token in new:
            sequence.tokens.append(token)
            self.num_tokens += 1
            if (reason := sequence.finish_reason()) is not None:
                break
        sequence.num_cached = len(sequence.tokens) - 1 if new else sequence.num_cached
        if reason is not None:
            self._prefixes.keep(sequence)
            self._leave(sequence)
        if reason is not None or sequence.generation.incremental:
            self._outcomes.append(Outcome(sequence, *sequence.news(), reason))


_PLAIN = Row(Sampling(temperature=0.0))
_NO_NUMBERS = "what the model computes for these tokens is no number (NaN): its values leave the range of its data type"


def _unsound(logits: torch.Tensor, parts: list[Part]) -> list[Sequence]:
    """The sequences whose scores are NaN. Where one of a row is, all are: they are of one state of the model."""
    if not parts:
        return []
    flags = logits[:, 0].isnan()
    if not flags.any():
        return []
    of_rows = [part.sequence for part in parts for _ in range(part.num_scored)]
    broken = [sequence for sequence, flag in zip(of_rows, flags.tolist(), strict=True) if flag]
    return list(dict.fromkeys(broken))


def _is_complete(part: Part) -> bool:
    """Whether nothing of its sequence is left to read, so that the next token can be chosen."""
    return part.before + len(part.tokens) >= len(part.sequence.tokens)
