"""Messages as bytes: small frozen structs, one tagged union, framed.

A frame is `magic "LC", u16 protocol version, u32 header length, u32 payload length, header, payload` (big endian). The
header is the message as MessagePack, with the name of its class under "type"; the payload is what only the two ends
understand (a pickle, never opened between). Encoding and decoding are pure: who owns a socket feeds the `Decoder`.

Within one protocol version fields may be added that have a default: whoever does not know them leaves them aside. Any
other change of a message, or of the frame, is another version, and the two ends refuse each other by name.
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar, TypeVar, Union

import msgspec

from jupyter_llmcloud.errors import ProtocolError

MAGIC = b"LC"
PROTOCOL_VERSION = 2  # 1 had headers of JSON, and no magic
_PEER = "the other end"
_HEAD = struct.Struct("!2sHII")
MAX_HEADER = 64 << 20
MAX_PAYLOAD = (1 << 32) - 1
_MAX_INT, _MIN_INT = (1 << 64) - 1, -(1 << 63)  # of MessagePack

M = TypeVar("M", bound="Message")


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag=True):
    """Base of all messages; `payload` travels as raw bytes beside the header."""

    kinds: ClassVar[dict[str, type[Message]]] = {}
    is_abstract: ClassVar[bool] = True  # never sent
    payload: bytes = b""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not cls.__dict__.get("is_abstract"):
            Message.kinds[cls.__name__] = cls


class Unreadable(Message, frozen=True, kw_only=True):
    """What a decoder makes of a message that it does not know, or whose fields are not as they should be.

    The frame itself is whole, so whoever reads goes on: a request is refused, a reply fails the request it is for.
    """

    is_abstract: ClassVar[bool] = True
    kind: str
    reason: str
    number: int = 0
    reply_to: int = 0


class _Outline(msgspec.Struct):
    """What every version's messages have."""

    type: str = ""
    number: int = 0
    reply_to: int = 0


_encoder = msgspec.msgpack.Encoder()
_outline_decoder = msgspec.msgpack.Decoder(_Outline)
replace = msgspec.structs.replace


class _Headers:
    """The decoder of all messages that were defined so far."""

    def __init__(self) -> None:
        self._num_kinds = -1
        self._decode: Any = None

    def decode(self, header: Any) -> Message:
        if self._num_kinds != len(Message.kinds):
            self._num_kinds = len(Message.kinds)
            self._decode = msgspec.msgpack.Decoder(Union[tuple(Message.kinds.values())]).decode  # noqa: UP007
        message: Message = self._decode(header)
        return message


_headers = _Headers()


def encode(message: Message) -> bytes:
    """The frame of a message. Raises ValueError when no decoder would take it."""
    payload = message.payload
    bare = replace(message, payload=b"") if payload else message
    try:
        header = _encoder.encode(bare)
    except (UnicodeEncodeError, OverflowError):
        header = _encoder.encode(_tidied(bare))
    if len(header) > MAX_HEADER or len(payload) > MAX_PAYLOAD:
        kind = type(message).__name__
        raise ValueError(f"{kind} has {len(header)} and {len(payload)} bytes: more than a message holds")
    return b"".join((_HEAD.pack(MAGIC, PROTOCOL_VERSION, len(header), len(payload)), header, payload))


def _tidied(message: M) -> M:
    """Half characters and numbers of more than 64 bits, which no header can carry, as what comes nearest to them."""
    fields = {name: tidy(getattr(message, name)) for name in message.__struct_fields__}
    return replace(message, **fields)


def tidy(value: Any) -> Any:
    """`value` with what an encoder takes in place of half characters and numbers of more than 64 bits."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {tidy(key): tidy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(item) for item in value]
    if isinstance(value, int) and not _MIN_INT <= value <= _MAX_INT:
        try:
            return float(value)
        except OverflowError:
            return str(value)
    return value


class Decoder:
    """Bytes in, messages out; keeps what is not complete yet.

    Args:
        peer: whose bytes they are, for errors.
    """

    def __init__(self, peer: str = _PEER) -> None:
        self._peer = peer
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Every message completed by `data`. Raises ProtocolError on bytes that are no frame of this version."""
        if not self._buffer:  # the usual case: whole frames, which are not copied for being looked at
            messages, used = _split(memoryview(data), self._peer)
            self._buffer += memoryview(data)[used:]
            return messages
        self._buffer += data
        with memoryview(self._buffer) as view:
            messages, used = _split(view, self._peer)
        del self._buffer[:used]
        return messages


def decode(data: bytes) -> Message:
    """The one message whose frame `data` is. Raises ProtocolError."""
    messages, used = _split(memoryview(data))
    if len(messages) != 1 or used != len(data):
        raise ProtocolError(f"{len(data)} bytes hold {len(messages)} whole messages: expected one, and nothing else.")
    return messages[0]


def _split(view: memoryview, peer: str = _PEER) -> tuple[list[Message], int]:
    """The messages whose frames are complete, and how many bytes they take."""
    messages: list[Message] = []
    start = 0
    while len(view) - start >= _HEAD.size:
        magic, version, header_size, payload_size = _HEAD.unpack_from(view, start)
        if magic != MAGIC or version != PROTOCOL_VERSION or header_size > MAX_HEADER:
            raise ProtocolError(_what_is_wrong(peer, magic, version, header_size))
        body = start + _HEAD.size
        end = body + header_size + payload_size
        if len(view) < end:
            break
        messages.append(_message(view[body : body + header_size], view[body + header_size : end], peer))
        start = end
    return messages, start


def _what_is_wrong(peer: str, magic: bytes, version: int, header_size: int) -> str:
    if magic != MAGIC:
        return (
            f"{peer} does not speak our protocol: a frame that begins with {magic!r}. It is another program, or "
            "an older version of jupyter-llmcloud: end it, and start it again with this one."
        )
    if version != PROTOCOL_VERSION:
        return (
            f"{peer} speaks version {version} of the protocol, this process version {PROTOCOL_VERSION}: they "
            "run different versions of jupyter-llmcloud. End the older one, and start it again with the newer."
        )
    return f"{peer} sent a frame with a header of {header_size} bytes, of at most {MAX_HEADER}: what comes is broken."


def _message(header: memoryview, payload: memoryview, peer: str) -> Message:
    try:
        message = _headers.decode(header)
    except msgspec.ValidationError as error:
        return _unreadable(header, error, peer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"{peer} sent a message whose header cannot be read: {error}.") from None
    if len(payload):
        msgspec.structs.force_setattr(message, "payload", bytes(payload))  # nobody else has seen it yet
    return message


def _unreadable(header: memoryview, error: Exception, peer: str) -> Unreadable:
    try:
        outline = _outline_decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ProtocolError(f"{peer} sent a message whose header is none: {error}.") from None
    if outline.type not in Message.kinds:
        reason = "is not known here: the two ends run different versions of jupyter-llmcloud"
    else:
        reason = f"cannot be read here: {error}"
    return Unreadable(kind=outline.type, reason=reason, number=outline.number, reply_to=outline.reply_to)
