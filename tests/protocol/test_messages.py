"""Messages as bytes: whatever the pieces they come in, and whatever else comes."""

from __future__ import annotations

import random
import struct
from typing import Any

import msgspec
import pytest

from jupyter_llmcloud.errors import ProtocolError
from jupyter_llmcloud.protocol import frames
from jupyter_llmcloud.protocol.agent_messages import Execute, NamesFound, Pull, Pulled, WorldStacks
from jupyter_llmcloud.protocol.frames import Decoder, Message, Unreadable, decode, encode
from jupyter_llmcloud.protocol.rank_messages import CheckpointPart, Heartbeat, LogRecords
from jupyter_llmcloud.protocol.rpc import Done, Refused

SOME: list[Message] = [
    WorldStacks(reply_to=3, ranks={0: {"main": [], "ä": "€\u2028", "b": None}}, cells={"cell": 1}),
    Pulled(payload=bytes(range(256)) * 50),
    Refused(code="UsageError", message="no", detail={"ranks": [0, 1]}),
    LogRecords(records=[{"kind": "stdout", "text": "x\ny\0"}]),
    Execute(world_id="w", run_id="r", name="n", code="1\n", ranks=[0, 2], seed=0, number=9),
    Pull(world_id="w", names=[]),
]


def frame(header: bytes, *, magic: bytes = b"LC", version: int = frames.PROTOCOL_VERSION) -> bytes:
    return struct.pack("!2sHII", magic, version, len(header), 0) + header


def packed(**fields: Any) -> bytes:
    return frame(msgspec.msgpack.encode(fields))


def test_a_message_comes_out_as_it_went_in() -> None:
    for message in SOME:
        assert Decoder().feed(encode(message)) == [message] == [decode(encode(message))]


def test_every_kind_makes_the_round_trip_with_its_defaults() -> None:
    values = {"str": "x", "int": 1, "float": 0.5, "float | None": 0.5, "int | None": 1, "bool": True, "list": []}
    for kind in Message.kinds.values():
        needed = {
            item.name: values.get(str(item.type).removeprefix("<class '").partition("'>")[0].partition("[")[0], {})
            for item in msgspec.structs.fields(kind)
            if item.required
        }
        message = kind(**needed)
        assert Decoder().feed(encode(message)) == [message], kind


def test_messages_that_came_share_nothing_with_each_other() -> None:
    bytes_of_one = encode(Execute(world_id="w", run_id="r", name="n", code="1"))
    first, second = Decoder().feed(bytes_of_one * 2)
    assert isinstance(first, Execute) and isinstance(second, Execute) and first == second
    first.save.append("model")
    assert second.save == Execute(world_id="w", run_id="r", name="n", code="1").save == []


def test_what_is_no_number_and_what_is_infinite_arrive_as_they_are() -> None:
    part = decode(encode(CheckpointPart(run_id="r", step=1, metric=float("inf"))))
    assert part == CheckpointPart(run_id="r", step=1, metric=float("inf"))
    beat = decode(encode(Heartbeat(run_id="r", still_s=float("nan"))))
    assert isinstance(beat, Heartbeat) and beat.still_s != beat.still_s


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("a\udc80b", "a\N{REPLACEMENT CHARACTER}b"),  # half a character: os.fsdecode makes them of file names
        ({"\ud800": ["\N{PILE OF POO}"]}, {"\N{REPLACEMENT CHARACTER}": ["\N{PILE OF POO}"]}),
        (1 << 70, float(1 << 70)),
        (-(10**400), str(-(10**400))),
        ((1, 2), [1, 2]),
    ],
)
def test_what_no_header_can_carry_arrives_as_what_comes_nearest(said: Any, heard: Any) -> None:
    assert decode(encode(LogRecords(records=[{"data": said}]))) == LogRecords(records=[{"data": heard}])


@pytest.mark.parametrize("seed", range(10))
def test_messages_come_in_any_pieces(seed: int) -> None:
    rng = random.Random(seed)
    sent = [rng.choice(SOME) for _ in range(20)]
    stream = b"".join(map(encode, sent))
    decoder, received = Decoder(), []
    while stream:
        size = rng.choice([1, 2, 7, 8, 9, 100, 5000])
        received += decoder.feed(stream[:size])
        stream = stream[size:]
    assert received == sent


def test_a_large_payload_is_not_copied_into_the_header() -> None:
    payload = random.Random(0).randbytes(20 << 20)
    data = encode(Pulled(payload=payload))
    assert len(data) < len(payload) + 200
    decoder = Decoder()
    received = [message for at in range(0, len(data), 1 << 16) for message in decoder.feed(data[at : at + (1 << 16)])]
    assert received == [Pulled(payload=payload)]


def test_nothing_comes_out_before_it_is_complete() -> None:
    decoder, data = Decoder(), encode(SOME[1])
    assert decoder.feed(data[:-1]) == []
    assert decoder.feed(data[-1:]) == [SOME[1]]


@pytest.mark.parametrize(
    ("garbage", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", "does not speak our protocol.*b'GE'.*older version"),
        (b"\xff" * 100, "does not speak our protocol"),
        (b"\0\0\0\x0f\0\0\0\0" + b'{"type":"Pull"}', "does not speak our protocol.*older version"),
        (frame(b"", version=77), "version 77 of the protocol, this process version 2: they run different versions"),
        (struct.pack("!2sHII", b"LC", frames.PROTOCOL_VERSION, 1 << 31, 0), "header of 2147483648 bytes, of at most"),
        (frame(b"\xc1"), "header cannot be read"),
        (frame(b"\x90"), "header is none"),
        (frame(b"\x81\xa4type\x01"), "header is none"),
        (frame(b"\x81\xa4type\xa2\xff\xfe"), "header cannot be read"),
        (frame(b""), "header cannot be read"),
    ],
)
def test_what_is_no_message_is_a_protocol_error_and_nothing_worse(garbage: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        Decoder().feed(garbage)


def test_a_field_of_a_later_version_is_passed_over() -> None:
    assert decode(packed(type="Refused", code="NotFound", invented_later=1)) == Refused(code="NotFound")


def test_a_message_of_a_later_version_is_named_and_those_behind_it_are_read() -> None:
    first, second = Decoder().feed(packed(type="InventedLater", number=4, what=[1]) + encode(Done(reply_to=1)))
    assert isinstance(first, Unreadable) and second == Done(reply_to=1)
    assert (first.kind, first.number, first.reply_to) == ("InventedLater", 4, 0)
    assert "different versions of jupyter-llmcloud" in first.reason


def test_a_message_with_other_fields_is_named_with_what_is_wrong() -> None:
    (missing,) = Decoder().feed(packed(type="Pull", number=2))
    assert isinstance(missing, Unreadable) and "missing required field `world_id`" in missing.reason
    (other,) = Decoder().feed(packed(type="NamesFound", reply_to=2, missing=3, own=[], imported=[]))
    assert isinstance(other, Unreadable) and (other.kind, other.reply_to) == ("NamesFound", 2)
    assert "Expected `array`, got `int`" in other.reason
    assert NamesFound.__name__ == "NamesFound"


def test_what_is_never_sent_cannot_come() -> None:
    for kind in ("Message", "Reply", "Request", "Unreadable"):
        (message,) = Decoder().feed(packed(type=kind))
        assert isinstance(message, Unreadable) and message.kind == kind


def test_one_message_is_expected_where_one_is_carried_in_another() -> None:
    data = encode(Done())
    for other in (b"", data * 2, data[:-1], data + b"L"):
        with pytest.raises(ProtocolError, match="whole messages: expected one"):
            decode(other)
