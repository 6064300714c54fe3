"""The shapes of OpenAI's answers: whole replies and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from jupyter_llmcloud.inference.engines.base import FinishReason, TokenLogprob

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
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Format(Protocol):
    """How a route words its answers."""

    prefix: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, if the format has one."""
        ...

    def piece(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """A choice in a chunk: new text, or the finish reason."""
        ...

    def choice(self, choice: Choice, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """A choice in a whole reply."""
        ...

    def reply(self, envelope: Envelope, choices: list[dict[str, Any]], usage: TokenUsage) -> dict[str, Any]:
        """The whole reply."""
        ...

    def chunk(self, envelope: Envelope, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream."""
        ...


TokenText = Callable[[int], str]


class CompletionFormat:
    """POST /v1/completions."""

    prefix = "cmpl"

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text

    def opening(self, index: int) -> None:
        """A completion begins with its text."""

    def piece(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """A choice in a chunk: new text, or the finish reason."""
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(logprobs, len(choice.text) - len(text)),
            "finish_reason": choice.finish_reason,
        }

    def choice(self, choice: Choice, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """A choice in a whole reply."""
        return {**self.piece(choice, choice.text, logprobs)}

    def reply(self, envelope: Envelope, choices: list[dict[str, Any]], usage: TokenUsage) -> dict[str, Any]:
        """The whole reply."""
        return {**self.chunk(envelope, choices), "usage": usage.body()}

    def chunk(self, envelope: Envelope, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream."""
        return _object("text_completion", envelope, choices)

    def _logprobs(self, entries: Sequence[TokenLogprob] | None, offset: int) -> dict[str, Any] | None:
        if entries is None:
            return None
        tokens = [self._token_text(entry.token) for entry in entries]
        ends = [offset]
        for token in tokens:
            ends.append(ends[-1] + len(token))
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._token_text(t): p for t, p in entry.top} for entry in entries],
            "text_offset": ends[:-1],
        }


class ChatFormat:
    """POST /v1/chat/completions."""

    prefix = "chatcmpl"

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text

    def opening(self, index: int) -> dict[str, Any]:
        """The role, before any text."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """A choice in a chunk: new text, or the finish reason."""
        return {
            "index": choice.index,
            "delta": {"content": text} if text else {},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": choice.finish_reason,
        }

    def choice(self, choice: Choice, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
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

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        content = [
            {
                **self._token(entry.token, entry.logprob),
                "top_logprobs": [self._token(t, p) for t, p in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        # A token that is a part of a character has no text of its own, so its bytes are not known here.
        known = "\ufffd" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}


def _object(kind: str, envelope: Envelope, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": envelope.id,
        "object": kind,
        "created": envelope.created,
        "model": envelope.model,
        "choices": choices,
        "system_fingerprint": None,
    }
