"""The shapes of OpenAI's answers: whole replies and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from jupyter_llmcloud.inference.engines.base import TokenLogprob
from jupyter_llmcloud.inference.openai.detokenize import PlacedLogprob, TextPiece
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def encode(body: Any) -> bytes:
    """JSON, compact."""
    return _encoder.encode(body)


def event(body: Any) -> bytes:
    """A server-sent event with JSON data."""
    return b"data: " + _encoder.encode(body) + b"\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all chunks of an answer share."""

    id: str
    created: int
    model: str


@dataclass(slots=True)
class TokenUsage:
    """How many tokens were read and written.

    Attributes:
        num_reused: tokens of the prompts that did not have to be read again; None: not known.
        num_reasoning: tokens of the answers that were reasoning; None: there could be none.
    """

    num_prompt: int = 0
    num_generated: int = 0
    num_reused: int | None = None
    num_reasoning: int | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's names for it."""
        told: dict[str, Any] = {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": self.num_prompt + self.num_generated,
        }
        if self.num_reused is not None:
            told["prompt_tokens_details"] = {"cached_tokens": self.num_reused}
        if self.num_reasoning is not None:
            told["completion_tokens_details"] = {"reasoning_tokens": self.num_reasoning}
        return told

    def input_output(self) -> dict[str, Any]:
        """The names that responses have for it."""
        return {
            "input_tokens": self.num_prompt,
            "input_tokens_details": {"cached_tokens": self.num_reused or 0},
            "output_tokens": self.num_generated,
            "output_tokens_details": {"reasoning_tokens": self.num_reasoning or 0},
            "total_tokens": self.num_prompt + self.num_generated,
        }


class Answer(Protocol):
    """Words the answer to one request, as its route does."""

    envelope: Envelope

    def opening(self, usage: TokenUsage) -> bytes:
        """The events before any text."""
        ...

    def piece(self, index: int, piece: TextPiece, usage: TokenUsage) -> bytes:
        """The events of a piece of a choice; empty when it adds nothing that is shown. Called also without a stream."""
        ...

    def closing(self, usage: TokenUsage) -> bytes:
        """The last events."""
        ...

    def whole(self, usage: TokenUsage) -> dict[str, Any]:
        """The whole reply, after the last piece."""
        ...


def completion_logprobs(vocabulary: Vocabulary, placed: Sequence[PlacedLogprob], shift: int = 0) -> dict[str, Any]:
    """Log probabilities as completions tell them; `shift`: characters of a text before the answer."""
    return {
        "tokens": [vocabulary.name(entry.token) for entry, _ in placed],
        "token_logprobs": [entry.logprob for entry, _ in placed],
        "top_logprobs": [_top(vocabulary, entry) for entry, _ in placed],
        "text_offset": [shift + offset for _, offset in placed],
    }


def _top(vocabulary: Vocabulary, entry: TokenLogprob) -> dict[str, float]:
    """Alternatives by name; of tokens spelled alike, the chosen or likelier one has it, the others their id."""
    names = {entry.token: vocabulary.name(entry.token)}
    for token, _ in entry.top:
        if token not in names:
            name = vocabulary.name(token)
            names[token] = f"token_id:{token}" if name in names.values() else name
    return {names[token]: logprob for token, logprob in ((entry.token, entry.logprob), *entry.top)}


def chat_logprobs(vocabulary: Vocabulary, placed: Sequence[PlacedLogprob]) -> list[dict[str, Any]]:
    """Log probabilities as chat completions and responses tell them."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        return {"token": vocabulary.name(token), "logprob": logprob, "bytes": list(vocabulary.spelled(token))}

    return [
        {**told(entry.token, entry.logprob), "top_logprobs": [told(token, logprob) for token, logprob in entry.top]}
        for entry, _ in placed
    ]


def openai_object(kind: str, envelope: Envelope, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": envelope.id,
        "object": kind,
        "created": envelope.created,
        "model": envelope.model,
        "choices": choices,
        "system_fingerprint": None,
    }
