"""The tokens of an answer, as that tells them itself: in its body, or in an event of its stream."""

from __future__ import annotations

import msgspec


class AnswerUsage(msgspec.Struct):
    """Tokens of a prompt and of its answer; None: not told."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether nobody needs to be asked for it."""
        return self.completion_tokens is not None


class _Told(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Response(msgspec.Struct):
    usage: _Told | None = None


class _Event(msgspec.Struct):
    usage: _Told | None = None
    response: _Response | None = None


_decode = msgspec.json.Decoder(_Event).decode
UNKNOWN = AnswerUsage()


def usage_in_body(body: bytes) -> AnswerUsage:
    """Of a whole answer, or of one event: by the names of completions, embeddings or responses."""
    try:
        event = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return UNKNOWN
    told = event.usage or (event.response.usage if event.response is not None else None)
    if told is None:
        return UNKNOWN
    prompt = told.prompt_tokens if told.prompt_tokens is not None else told.input_tokens
    completion = told.completion_tokens if told.completion_tokens is not None else told.output_tokens
    return UNKNOWN if prompt is None else AnswerUsage(prompt, completion or 0)


def usage_in_events(events: bytes) -> AnswerUsage:
    """Of the last piece of a stream, where its client has asked for that."""
    for event in reversed(events.split(b"\n\n")):
        if b'"usage"' in event:
            return usage_in_body(event.partition(b"data:")[2].strip())
    return UNKNOWN
