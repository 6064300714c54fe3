"""What routing knows of a request, read from its body without looking into the prompt."""

from __future__ import annotations

from typing import Any

import msgspec

from jupyter_llmcloud.core.serving.endpoint.response_id import replica_of
from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape

_NOTHING = msgspec.Raw(b"")


class _Body(msgspec.Struct, kw_only=True):
    prompt: msgspec.Raw = _NOTHING
    messages: msgspec.Raw = _NOTHING
    input: msgspec.Raw = _NOTHING
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    user: Any = None
    previous_response_id: Any = None


class NamedBody(_Body, kw_only=True):
    """A body with the model that it names."""

    model: str
    stream: bool | None = False


_decode = msgspec.json.Decoder(_Body).decode
_decode_named = msgspec.json.Decoder(NamedBody).decode


def named_body(body: bytes) -> NamedBody | None:
    """What the gateway reads of a body; None of one that is refused."""
    try:
        return _decode_named(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def shape_of(body: bytes, actor: str, adapter: str = "") -> RequestShape:
    """An estimate of what a request asks for; requests of one `user`, or else of one actor, stay together."""
    try:
        read = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return RequestShape(key=actor, adapter=adapter)  # the replica refuses it, and says why
    return shape_from(read, actor, adapter)


def shape_from(read: _Body, actor: str, adapter: str = "") -> RequestShape:
    """The same of what has been read."""
    prompt = memoryview(read.messages or read.prompt or read.input)
    limit = read.max_completion_tokens if read.max_completion_tokens is not None else read.max_output_tokens
    limit = limit if limit is not None else read.max_tokens
    key = f"user:{read.user}" if isinstance(read.user, str) and read.user else actor
    earlier = read.previous_response_id
    replica = replica_of(earlier) if isinstance(earlier, str) else ""
    return RequestShape.estimate(prompt, limit, read.n, adapter, key, replica)
