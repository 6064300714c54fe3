"""Guesses of the next tokens from what was said before (prompt lookup, Saxena 2023), and whether they pay.

A text that repeats its prompt, as code edits and summaries do, goes on after a few tokens as it went on after the same
tokens before. A step that reads a handful of tokens costs little more than one that reads one, as long as it is bound
by reading the weights; the model's own choice at each of them tells which guesses were right, so no answer changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_DRAFT = 6
_NGRAM = 3
_MAX_LOOK_BACK = 4096
_MOST_SEQUENCES = 4
_UNKNOWN = 0.3
_FIRST_PAUSE = 8
_LONGEST_PAUSE = 256


class Speculation:
    """Measures what steps cost, and so how many guesses must be right to be worth their reading."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def allows(self, num_decoding: int) -> bool:
        """Whether steps for so many sequences are bound by reading the weights, as far as is known."""
        return 0 < num_decoding <= _MOST_SEQUENCES

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step that read so many tokens has taken so long."""
        before = self._seconds.get(num_tokens, seconds)
        self._seconds[num_tokens] = before + 0.2 * (seconds - before)

    def needed(self, num_sequences: int, num_guesses: int) -> float:
        """The share of guesses that must be right, so that a step with them gives tokens as quickly as one without."""
        plain, longer = self._seconds.get(num_sequences), self._seconds.get(num_sequences + num_guesses)
        if plain is None or longer is None:
            return _UNKNOWN
        return max(0.05, (longer / plain - 1) * num_sequences / num_guesses)


@dataclass(slots=True)
class Drafts:
    """The guesses of one sequence, and what became of them.

    Attributes:
        accepted: the share of guesses that were right, lately.
    """

    accepted: float = 0.6
    _pause: int = 0
    _next_pause: int = _FIRST_PAUSE
    _index: dict[tuple[int, ...], int] = field(default_factory=dict)
    _num_indexed: int = 0

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """At most `limit` tokens that may come next; none, where guesses have not paid lately."""
        self._note(tokens)
        if self._pause:
            self._pause -= 1
            return []
        limit = min(limit, MAX_DRAFT)
        place = self._index.get(tuple(tokens[-_NGRAM:]))
        if limit < 1 or place is None:
            return []
        return tokens[place : place + limit]

    def judge(self, num_proposed: int, num_right: int, needed: float) -> None:
        """So many of the guesses were what the model chose, and such a share must be to be worth the time."""
        self.accepted += 0.3 * (num_right / num_proposed - self.accepted)
        if self.accepted < needed:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
            self.accepted = max(0.6, needed)
        elif num_right == num_proposed:
            self._next_pause = _FIRST_PAUSE

    def _note(self, tokens: list[int]) -> None:
        """Remember what came after each few tokens; the last ones are not followed by anything yet."""
        begin = max(self._num_indexed, _NGRAM, len(tokens) - _MAX_LOOK_BACK)
        for place in range(begin, len(tokens)):
            self._index[tuple(tokens[place - _NGRAM : place])] = place
        self._num_indexed = max(self._num_indexed, len(tokens))
