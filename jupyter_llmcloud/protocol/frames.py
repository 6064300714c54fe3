"""Messages as bytes: small frozen types, one tagged union, framed.

A frame is `u32 header length, u32 payload length, header, payload` (big endian). The header is JSON
`{"type": <class name>, ...fields}`; the payload is what only the two ends understand (a pickle, never opened between).
Encoding and decoding are pure: who owns a socket feeds the `Decoder`.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

_HEAD = struct.Struct("!II")
_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False)
MAX_HEADER = 64 << 20
MAX_PAYLOAD = (1 << 32) - 1


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base of all messages. `reply_to` matches an answer to its request; `payload` travels as raw bytes."""

    kinds: ClassVar[dict[str, type[Message]]] = {}
    reply_to: int = 0
    payload: bytes = b""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Message.kinds[cls.__name__] = cls


@functools.cache
def _defaults(kind: str) -> dict[str, Any]:
    """What is left out of a header, by the names of a message's fields."""
    return {item.name: item.default for item in fields(Message.kinds[kind]) if item.name != "payload"}


@functools.cache
def _blank(kind: str) -> tuple[dict[str, Any], dict[str, Callable[[], Any]], frozenset[str]]:
    """Of a message's fields: the defaults, what makes a default, and the names of those without one."""
    rows = fields(Message.kinds[kind])
    plain = {item.name: item.default for item in rows if item.default is not MISSING}
    made = {item.name: item.default_factory for item in rows if item.default_factory is not MISSING}
    return plain, made, frozenset(item.name for item in rows) - plain.keys() - made.keys()


def encode(message: Message, reply_to: int | None = None) -> bytes:
    """The frame of a message; with `reply_to`, as if it had that. Raises ValueError when no decoder would take it."""
    kind = type(message).__name__
    values = message.__dict__ if reply_to is None else {**message.__dict__, "reply_to": reply_to}
    body: dict[str, Any] = {"type": kind}
    for name, default in _defaults(kind).items():
        if (value := values[name]) != default:
            body[name] = value
    header = _JSON.encode(body).encode()
    if len(header) > MAX_HEADER or len(message.payload) > MAX_PAYLOAD:
        raise ValueError(f"{kind} has {len(header)} and {len(message.payload)} bytes: more than a message holds")
    return _HEAD.pack(len(header), len(message.payload)) + header + message.payload


class Decoder:
    """Bytes in, messages out; keeps what is not complete yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Every message completed by `data`. Raises ValueError on a frame that cannot be ours."""
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while len(self._buffer) - start >= _HEAD.size:
            header_size, payload_size = _HEAD.unpack_from(self._buffer, start)
            if header_size > MAX_HEADER:
                raise ValueError(f"a frame header of {header_size} bytes: the other end does not speak our protocol")
            body = start + _HEAD.size
            end = body + header_size + payload_size
            if len(self._buffer) < end:
                break
            header = bytes(self._buffer[body : body + header_size])
            payload = bytes(self._buffer[body + header_size : end])
            messages.append(_decode(header, payload))
            start = end
        del self._buffer[:start]
        return messages


def _decode(header: bytes, payload: bytes) -> Message:
    body = json.loads(header)
    kind = Message.kinds.get(str(body.pop("type", ""))) if isinstance(body, dict) else None
    if kind is None:
        raise ValueError("an unknown message: the two ends run different versions of jupyter-llmcloud")
    known = _defaults(kind.__name__)
    plain, made, needed = _blank(kind.__name__)
    if missing := needed - body.keys():
        raise ValueError(f"a message that is not complete: {kind.__name__} without {', '.join(sorted(missing))}")
    # Not by its __init__, which sets the fields of a frozen class one by one: several messages cross for every cell.
    message = object.__new__(kind)
    values = message.__dict__
    values.update(plain)
    for name, make in made.items():
        if name not in body:
            values[name] = make()
    values.update((key, value) for key, value in body.items() if key in known)
    values["payload"] = payload
    return message
