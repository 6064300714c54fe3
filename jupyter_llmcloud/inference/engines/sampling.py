"""Choosing the next token. One rule serves every engine: return scores whose argmax is the token.

A sampled token is the argmax of the log probabilities with Gumbel noise added, which is the same
distribution as drawing from the softmax. So a batch may mix greedy and sampled sequences, a greedy one
keeps the model's own scores untouched, and a seed gives the same tokens whatever else is in the batch: its
noise depends on seed and position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from jupyter_llmcloud.inference.engines.base import Generation, Sampling, TokenConstraint, TokenLogprob

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing by it would overflow."""


class FollowedConstraint:
    """The constraint of a sequence, which has accepted the tokens that are known to have been generated."""

    def __init__(self, constraint: TokenConstraint) -> None:
        self._constraint = constraint
        self._num_accepted = 0

    def allowed(self, generated: Sequence[int], vocabulary: int) -> torch.Tensor:
        """Which tokens may come after these: [vocabulary], bool."""
        for token in generated[self._num_accepted :]:
            self._constraint.accept(token)
        self._num_accepted = len(generated)
        packed = np.frombuffer(self._constraint.allowed(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[:vocabulary].astype(bool)
        return torch.from_numpy(np.pad(bits, (0, vocabulary - len(bits))))


@dataclass(slots=True)
class Row:
    """One sequence of a batch at the moment its next token is chosen.

    Attributes:
        sampling: its parameters.
        generated: the tokens generated so far.
        logprobs: where to add the log probabilities, when they were asked for.
        prompt: the tokens before those.
        banned: tokens that must not come now.
        constraint: what the tokens must follow.
    """

    sampling: Sampling = field(default_factory=Sampling)
    generated: Sequence[int] = ()
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: Sequence[int] = ()
    banned: Collection[int] = ()
    constraint: FollowedConstraint | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its token is simply the likeliest."""
        return self.constraint is None and not self.banned and not _changes_scores(self.sampling)


def ends_of(generation: Generation, eos: frozenset[int]) -> frozenset[int]:
    """The tokens that end a sequence of a model whose own ones are `eos`."""
    return frozenset(generation.stop_token_ids) | (frozenset() if generation.ignore_eos else eos)


class Sampler:
    """Chooses tokens for a batch. Used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._noise = torch.Generator(device=device)
        self._noise.seed()
        self._seeded = torch.Generator(device=device)

    def scores(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Scores [n, vocabulary] whose argmax is each row's token; `logits` may have more rows."""
        scores = logits
        if not all(row.is_plain for row in rows):
            scores = logits.clone()
            _add_biases(scores, rows)
            for index, row in enumerate(rows):
                _apply_penalties(scores[index], row)
                _apply_limits(scores[index], row)
            self._add_noise(scores, rows)
        if any(row.sampling.num_logprobs is not None for row in rows):
            _record_logprobs(logits, scores, rows)
        return scores

    def _add_noise(self, scores: torch.Tensor, rows: Sequence[Row]) -> None:
        sampled = [index for index, row in enumerate(rows) if row.sampling.temperature >= GREEDY_BELOW]
        if not sampled:
            return
        chosen = [rows[index] for index in sampled]
        temperatures = torch.tensor([row.sampling.temperature for row in chosen], device=scores.device)
        wanted = scores[sampled] / temperatures.unsqueeze(1)
        _restrict(wanted, [row.sampling for row in chosen])
        scores[sampled] = wanted - self._exponential(wanted, chosen).log_()

    def _exponential(self, like: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        noise = torch.empty_like(like).exponential_(generator=self._noise)
        for index, row in enumerate(rows):
            if row.sampling.seed is not None:
                self._seeded.manual_seed(_step_seed(row.sampling.seed, len(row.generated)))
                noise[index].exponential_(generator=self._seeded)
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny)


def _changes_scores(sampling: Sampling) -> bool:
    return bool(
        sampling.temperature >= GREEDY_BELOW
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
        or sampling.logit_bias
    )


def _step_seed(seed: int, position: int) -> int:
    """A seed of its own for every position: neighbouring seeds or positions share no noise."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _add_biases(scores: torch.Tensor, rows: Sequence[Row]) -> None:
    """Those of all rows at once."""
    biased = [(index, *pair) for index, row in enumerate(rows) for pair in row.sampling.logit_bias]
    if biased:
        indices, ids, biases = zip(*biased, strict=True)
        places = torch.tensor(indices, device=scores.device), torch.tensor(ids, device=scores.device)
        scores.index_put_(places, torch.tensor(biases, dtype=scores.dtype, device=scores.device), accumulate=True)


def _apply_penalties(scores: torch.Tensor, row: Row) -> None:
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0 and (row.prompt or row.generated):
        seen = torch.tensor([*row.prompt, *row.generated], device=scores.device).unique()
        before, penalty = scores[seen], sampling.repetition_penalty
        scores[seen] = torch.where(before > 0, before / penalty, before * penalty)
    if row.generated and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, counts = torch.unique(torch.tensor(row.generated, device=scores.device), return_counts=True)
        scores[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts.to(scores.dtype)


def _apply_limits(scores: torch.Tensor, row: Row) -> None:
    if row.constraint is not None:
        allowed = row.constraint.allowed(row.generated, scores.shape[0]).to(scores.device)
        scores.masked_fill_(~allowed, -torch.inf)
    if row.banned:
        scores[list(row.banned)] = -torch.inf


def _restrict(scores: torch.Tensor, samplings: Sequence[Sampling]) -> None:
    """Put every token outside top-k, top-p and min-p to minus infinity, with one sort for the first two."""
    vocabulary = scores.shape[1]
    if any(sampling.min_p > 0.0 for sampling in samplings):
        min_p = torch.tensor([sampling.min_p for sampling in samplings], device=scores.device).unsqueeze(1)
        lowest = scores.amax(dim=1, keepdim=True) + min_p.log()
        scores.masked_fill_(scores < lowest, -torch.inf)
    limited = [i for i, s in enumerate(samplings) if 0 < s.top_k < vocabulary or s.top_p < 1.0]
    if not limited:
        return
    kept = [samplings[index].top_k or vocabulary for index in limited]
    top_k = torch.tensor(kept, device=scores.device).clamp_max(vocabulary).unsqueeze(1)
    top_p = torch.tensor([samplings[index].top_p for index in limited], device=scores.device).unsqueeze(1)
    ordered = scores[limited].sort(dim=1, descending=True).values
    outside = torch.arange(vocabulary, device=scores.device) >= top_k
    probabilities = ordered.masked_fill(outside, -torch.inf).softmax(dim=1)
    outside |= probabilities.cumsum(dim=1) - probabilities >= top_p
    lowest = ordered.masked_fill_(outside, torch.inf).amin(dim=1, keepdim=True)
    rows = scores[limited]
    scores[limited] = rows.masked_fill_(rows < lowest, -torch.inf)


def _record_logprobs(logits: torch.Tensor, scores: torch.Tensor, rows: Sequence[Row]) -> None:
    wanted = [index for index, row in enumerate(rows) if row.sampling.num_logprobs is not None]
    tokens = scores[wanted].argmax(dim=-1)
    counts = [rows[index].sampling.num_logprobs or 0 for index in wanted]
    for index, entry in zip(wanted, logprobs_of(logits[wanted], tokens, counts), strict=True):
        rows[index].logprobs.append(entry)


def likeliest(scores: torch.Tensor) -> list[int]:
    """The index of each row's largest score; of equal ones, the first."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return scores.numpy().argmax(axis=1).tolist()  # ten times as quick as torch's
    return scores.argmax(dim=-1).tolist()


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprob]:
    """The log probability of one token for each row of `logits`, and of the row's count of likeliest ones."""
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
    top = logprobs.topk(min(max(counts), logprobs.shape[1]))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, (ids, values), count in zip(tokens.tolist(), chosen, likeliest, counts, strict=True)
    ]
