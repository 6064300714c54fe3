"""Tokens to text while they arrive, and stop strings that are never shown, not even their beginning."""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jupyter_llmcloud.inference.engines.base import FinishReason, TokenBatch, TokenLogprob
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of an answer: what its tokens add to the prompt. Bytes that are no UTF-8 become U+FFFD.

    Of the prompt it knows whether there is text at all, and the bytes of a last character that is not complete.

    Args:
        visible: special tokens that the text shows.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], visible: Collection[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._visible = visible
        self._at_start = all(token in vocabulary.special for token in prompt)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(vocabulary.tail(prompt))
        self._prompts_own = bool(self._decoder.getstate()[0])
        self.num_characters = 0

    def step(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token in self._vocabulary.special:
            return self._text(self._vocabulary.special[token]) if token in self._visible else ""
        of = self._vocabulary.first_bytes_of if self._at_start else self._vocabulary.bytes_of
        self._at_start = False
        return self._text(self._decoder.decode(of(token)))

    def rest(self) -> str:
        """What was held back, now that no more tokens come."""
        return self._text(self._decoder.decode(b"", True))

    def _text(self, text: str) -> str:
        if text and self._prompts_own:
            # The broken character was the prompt's: it stands in the prompt's own text.
            self._prompts_own = False
            text = text.removeprefix(_REPLACEMENT)
        self.num_characters += len(text)
        return text


class StopStrings:
    """Passes text on, except what is or might become a stop string.

    Special tokens that a stop string spells come as hidden text: it is matched by such a stop, and never shown.
    """

    def __init__(self, stops: Sequence[str], spelled: Sequence[str] = ()) -> None:
        self._stops = [(stop, any(special in stop for special in spelled)) for stop in stops]
        self._held: list[tuple[str, bool]] = []
        self._num_passing = 0  # of what is held, from its beginning on: where no stop string may end

    def feed(self, text: str, *, hidden: bool = False, passes: bool = False) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string was met (nothing may follow then).

        What `passes` is shown also where it is a stop string; it may only begin one that ends later.
        """
        if not self._stops:
            return ("" if hidden else text), False
        self._held += [(character, not hidden) for character in text]
        if passes:
            self._num_passing = len(self._held)
        found = [position for stop in self._stops if (position := self._find(*stop)) is not None]
        if found:
            return self._show(min(found)), True
        return self._show(min(self._may_begin(*stop) for stop in self._stops)), False

    def rest(self) -> str:
        """What was held back and turned out not to be a stop string."""
        return self._show(len(self._held))

    def _seen(self, with_hidden: bool) -> tuple[str, list[int]]:
        places = [place for place, (_, shown) in enumerate(self._held) if shown or with_hidden]
        return "".join(self._held[place][0] for place in places), places

    def _find(self, stop: str, with_hidden: bool) -> int | None:
        text, places = self._seen(with_hidden)
        first = bisect_left(places, self._num_passing) - len(stop) + 1  # where one begins that ends later
        position = text.find(stop, max(0, first))
        return None if position < 0 else places[position]

    def _may_begin(self, stop: str, with_hidden: bool) -> int:
        text, places = self._seen(with_hidden)
        held = overlap(text, stop)
        return places[len(places) - held] if held else len(self._held)

    def _show(self, count: int) -> str:
        shown = "".join(character for character, visible in self._held[:count] if visible)
        del self._held[:count]
        self._num_passing = max(0, self._num_passing - count)
        return shown


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class PlacedLogprob(NamedTuple):
    """The log probability of a token, and where in the answer its first character stands."""

    entry: TokenLogprob
    offset: int


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that can be shown, with the log probabilities of the tokens that came in.

    `num_tokens` counts every token generated, an end-of-sequence token included; `scored` are the log probabilities
    of the prompt's tokens from the second one on, with the first piece, where they were asked for; `offsets` are where
    in the answer each token that came in begins, without one that ends the sequence.
    """

    text: str
    logprobs: list[PlacedLogprob]
    num_tokens: int
    finish_reason: FinishReason | None
    scored: Sequence[TokenLogprob] = ()
    offsets: Sequence[int] = ()


class Transcript:
    """Turns the batches of one sequence into pieces of text, up to its end or its first stop string.

    Args:
        visible: special tokens that the text shows.
        num_scored: log probabilities of the prompt that the first batch brings.
        places_end: whether the token that ends the sequence has a log probability in the pieces, too.
        min_tokens: no stop string ends the text within so many tokens.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: Sequence[int],
        stops: Sequence[str],
        visible: Collection[int] = (),
        *,
        num_scored: int = 0,
        places_end: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = Detokenizer(vocabulary, prompt, visible)
        self._num_scored = num_scored
        self._places_end = places_end
        self._num_passing = min_tokens
        special = vocabulary.special.items()
        self._spelled = {token: text for token, text in special if any(text in stop for stop in stops)}
        self._stops = StopStrings(stops, list(self._spelled.values()))

    def feed(self, batch: TokenBatch) -> TextPiece:
        """The next piece. After one with a finish reason nothing more may be fed."""
        scored, self._num_scored = batch.logprobs[: self._num_scored], 0
        entries = batch.logprobs[len(scored) :]
        shown: list[str] = []
        offsets: list[int] = []
        num_text = len(batch.tokens) - (batch.finish_reason == "stop")
        for index in range(num_text):
            offsets.append(self._decoder.num_characters)
            text, stopped = self._step(batch.tokens[index])
            shown.append(text)
            if stopped:
                return TextPiece("".join(shown), _placed(entries, offsets), index + 1, "stop", scored, offsets)
        reason = batch.finish_reason
        if reason is not None:
            text, stopped = self._stops.feed(self._decoder.rest())
            shown += [text, "" if stopped else self._stops.rest()]
            reason = "stop" if stopped else reason
            if self._places_end:
                offsets += [self._decoder.num_characters] * (len(batch.tokens) - num_text)
        return TextPiece("".join(shown), _placed(entries, offsets), len(batch.tokens), reason, scored, offsets)

    def _step(self, token: int) -> tuple[str, bool]:
        passes = self._num_passing > 0
        self._num_passing -= passes
        if (spelled := self._spelled.get(token)) is not None:
            return self._stops.feed(spelled, hidden=True, passes=passes)
        return self._stops.feed(self._decoder.step(token), passes=passes)


def _placed(entries: Sequence[TokenLogprob], offsets: Sequence[int]) -> list[PlacedLogprob]:
    # A batch without log probabilities has no entries; an end-of-sequence token has one and no place.
    return [PlacedLogprob(entry, offset) for entry, offset in zip(entries, offsets, strict=False)]
