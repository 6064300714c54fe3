"""Tokens to text while they arrive, and stop strings that are never shown, not even their beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream

from jupyter_llmcloud.inference.engines.base import FinishReason, TokenBatch, TokenLogprob

_PROMPT_TAIL = 8
"""How much of the prompt the decoder sees: enough to know whether a first space belongs to the text."""

_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Token ids to text, piece by piece."""

    def step(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        ...

    def rest(self) -> str:
        """What was held back, now that no more tokens come."""
        ...


class _FastDetokenizer:
    """The tokenizers library's own incremental decoder; the cost of a token does not grow with the text."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt[-_PROMPT_TAIL:]), skip_special_tokens=True)
        self._held: list[int] = []

    def step(self, token: int) -> str:
        piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            self._held.append(token)
            return ""
        self._held.clear()
        return piece

    def rest(self) -> str:
        return self._tokenizer.decode(self._held, skip_special_tokens=True) if self._held else ""


class _SlowDetokenizer:
    """For tokenizers written in Python: decode a short window with the token, show what the token added."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_PROMPT_TAIL:])
        self._shown = self._decode()

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, skip_special_tokens=True))

    def step(self, token: int) -> str:
        self._window.append(token)
        text = self._decode()
        if text.endswith(_REPLACEMENT):
            return ""
        piece = text[len(self._shown) :]
        self._window = self._window[-_PROMPT_TAIL:]
        self._shown = self._decode()
        return piece

    def rest(self) -> str:
        return self._decode()[len(self._shown) :]


def detokenizer(tokenizer: Any, prompt: Sequence[int]) -> Detokenizer:
    """A decoder for what follows `prompt`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _FastDetokenizer(backend, prompt)
    return _SlowDetokenizer(tokenizer, prompt)


class StopStrings:
    """Passes text on, except what is or might become a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string was met (nothing may follow then)."""
        if not self._stops:
            return text, False
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def rest(self) -> str:
        """What was held back and turned out not to be a stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that can be shown, with the log probabilities of the tokens that came in.

    `num_tokens` counts every token generated, an end-of-sequence token included.
    """

    text: str
    logprobs: list[TokenLogprob]
    num_tokens: int
    finish_reason: FinishReason | None


class Transcript:
    """Turns the batches of one sequence into pieces of text, up to its end or its first stop string."""

    def __init__(self, decoder: Detokenizer, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = StopStrings(stops)

    def feed(self, batch: TokenBatch) -> Piece:
        """The next piece. After one with a finish reason nothing more may be fed."""
        shown: list[str] = []
        num_text = len(batch.tokens) - (batch.finish_reason == "stop")
        for index in range(num_text):
            text, stopped = self._stops.feed(self._decoder.step(batch.tokens[index]))
            shown.append(text)
            if stopped:
                return Piece("".join(shown), batch.logprobs[: index + 1], index + 1, "stop")
        reason = batch.finish_reason
        if reason is not None:
            text, stopped = self._stops.feed(self._decoder.rest())
            shown += [text, self._stops.rest()]
            reason = "stop" if stopped else reason
        return Piece("".join(shown), batch.logprobs[:num_text], len(batch.tokens), reason)
