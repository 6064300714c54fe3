"""The shapes of OpenAI's answers: whole replies and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from jupyter_llmcloud.inference.engines.base import FinishReason, TokenLogprob
from jupyter_llmcloud.inference.openai.detokenize import PlacedLogprob
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
    """How many tokens were read and written."""

    num_prompt: int = 0
    num_generated: int = 0

    def body(self) -> dict[str, int]:
        """OpenAI's names for it."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": self.num_prompt + self.num_generated,
        }


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    index: int
    text: str = ""
    logprobs: list[PlacedLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Format(Protocol):
    """How a route words its answers."""

    prefix: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, if the format has one."""
        ...

    def piece(self, choice: Choice, text: str, logprobs: Sequence[PlacedLogprob] | None) -> dict[str, Any]:
        """A choice in a chunk: new text, or the finish reason."""
        ...

    def choice(self, choice: Choice, logprobs: Sequence[PlacedLogprob] | None) -> dict[str, Any]:
        """A choice in a whole reply."""
        ...

    def reply(self, envelope: Envelope, choices: list[dict[str, Any]], usage: TokenUsage) -> dict[str, Any]:
        """The whole reply."""
        ...

    def chunk(self, envelope: Envelope, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream."""
        ...


class CompletionFormat:
    """POST /v1/completions."""

    prefix = "cmpl"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def opening(self, index: int) -> None:
        """A completion begins with its text."""

    def piece(self, choice: Choice, text: str, logprobs: Sequence[PlacedLogprob] | None) -> dict[str, Any]:
        """A choice in a chunk: new text, or the finish reason."""
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": choice.finish_reason,
        }

    def choice(self, choice: Choice, logprobs: Sequence[PlacedLogprob] | None) -> dict[str, Any]:
        """A choice in a whole reply."""
        return {**self.piece(choice, choice.text, logprobs)}

    def reply(self, envelope: Envelope, choices: list[dict[str, Any]], usage: TokenUsage) -> dict[str, Any]:
        """The whole reply."""
        return {**self.chunk(envelope, choices), "usage": usage.body()}

    def chunk(self, envelope: Envelope, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream."""
        return _object("text_completion", envelope, choices)

    def _logprobs(self, placed: Sequence[PlacedLogprob] | None) -> dict[str, Any] | None:
        if placed is None:
            return None
        return {
            "tokens": [self._vocabulary.name(entry.token) for entry, _ in placed],
            "token_logprobs": [entry.logprob for entry, _ in placed],
            "top_logprobs": [self._top(entry) for entry, _ in placed],
            "text_offset": [offset for _, offset in placed],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Alternatives by name; of tokens spelled alike, the chosen or likelier one has it, the others their id."""
        names = {entry.token: self._vocabulary.name(entry.token)}
        for token, _ in entry.top:
            if token not in names:
                name = self._vocabulary.name(token)
                names[token] = f"token_id:{token}" if name in names.values() else name
        return {names[token]: logprob for token, logprob in entry.top}


class ChatFormat:
    """POST /v1/chat/completions."""

    prefix = "chatcmpl"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def opening(self, index: int) -> dict[str, Any]:
        """The role, before any text."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, choice: Choice, text: str, logprobs: Sequence[PlacedLogprob] | None) -> dict[str, Any]:
        """A choice in a chunk: new text, or the finish reason."""
        return {
            "index": choice.index,
            "delta": {"content": text} if text else {},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": choice.finish_reason,
        }

    def choice(self, choice: Choice, logprobs: Sequence[PlacedLogprob] | None) -> dict[str, Any]:
        """A choice in a whole reply."""
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": choice.finish_reason,
        }

    def reply(self, envelope: Envelope, choices: list[dict[str, Any]], usage: TokenUsage) -> dict[str, Any]:
        """The whole reply."""
        return {**_object("chat.completion", envelope, choices), "usage": usage.body()}

    def chunk(self, envelope: Envelope, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream."""
        return _object("chat.completion.chunk", envelope, choices)

    def _logprobs(self, placed: Sequence[PlacedLogprob] | None) -> dict[str, Any] | None:
        if placed is None:
            return None
        content = [
            {
                **self._token(entry.token, entry.logprob),
                "top_logprobs": [self._token(t, p) for t, p in entry.top],
            }
            for entry, _ in placed
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = list(self._vocabulary.spelled(token))
        return {"token": self._vocabulary.name(token), "logprob": logprob, "bytes": spelled}


def _object(kind: str, envelope: Envelope, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": envelope.id,
        "object": kind,
        "created": envelope.created,
        "model": envelope.model,
        "choices": choices,
        "system_fingerprint": None,
    }
