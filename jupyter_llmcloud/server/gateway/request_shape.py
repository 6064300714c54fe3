"""What routing knows of a request, read from its body without looking into the prompt."""

from __future__ import annotations

from typing import Any

import msgspec

from jupyter_llmcloud.core.serving.endpoint.response_id import replica_of
from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape

_NOTHING = msgspec.Raw(b"")


class _Body(msgspec.Struct):
    prompt: msgspec.Raw = _NOTHING
    messages: msgspec.Raw = _NOTHING
    input: msgspec.Raw = _NOTHING
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    user: Any = None
    previous_response_id: Any = None


_decode = msgspec.json.Decoder(_Body).decode


def shape_of(body: bytes, actor: str, adapter: str = "") -> RequestShape:
    """An estimate of what a request asks for; requests of one `user`, or else of one actor, stay together."""
    try:
        read = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return RequestShape(key=actor, adapter=adapter)  # the replica refuses it, and says why
    prompt = memoryview(read.messages or read.prompt or read.input)
    limits = (read.max_completion_tokens, read.max_output_tokens, read.max_tokens)
    limit = next((one for one in limits if one is not None), None)
    key = f"user:{read.user}" if isinstance(read.user, str) and read.user else actor
    earlier = read.previous_response_id
    replica = replica_of(earlier) if isinstance(earlier, str) else ""
    return RequestShape.estimate(prompt, limit, read.n, adapter, key, replica)
