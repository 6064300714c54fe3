"""Messages as bytes: whatever the pieces they come in, and whatever else comes."""

from __future__ import annotations

import dataclasses
import random
import struct

import pytest

from jupyter_llmcloud.protocol.agent_messages import Done, Execute, Pull, Refused
from jupyter_llmcloud.protocol.frames import Decoder, Message, encode
from jupyter_llmcloud.protocol.rank_messages import Printed

SOME: list[Message] = [
    Done(reply_to=3, values={"a": [1, {"b": None}], "ä": "€\u2028"}),
    Done(payload=bytes(range(256)) * 50),
    Refused(error="UsageError", reason="no"),
    Printed(records=[{"kind": "stdout", "text": "x\ny\0\udc80"}]),
    Execute(world_id="w", run_id="r", name="n", code="1\n", ranks=[0, 2], seed=0),
    Pull(world_id="w", names=[]),
]


def test_a_message_comes_out_as_it_went_in() -> None:
    for message in SOME:
        assert Decoder().feed(encode(message)) == [message]


def test_every_kind_makes_the_round_trip_with_its_defaults() -> None:
    for kind in Message.kinds.values():
        values = {"str": "x", "int": 1, "float": 0.5, "float | None": 0.5, "bool": True, "list": [1], "dict": {"k": 1}}
        needed = {
            item.name: values[str(item.type).partition("[")[0]]
            for item in dataclasses.fields(kind)
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        }
        message = kind(**needed)  # type: ignore[arg-type]
        assert Decoder().feed(encode(message)) == [message]


def test_messages_that_came_share_nothing_with_each_other() -> None:
    frame = encode(Execute(world_id="w", run_id="r", name="n", code="1"))
    first, second = Decoder().feed(frame + frame.replace(b'"save":[],', b'"":0,     '))
    assert isinstance(first, Execute) and isinstance(second, Execute) and first == second
    first.save.append("model")
    assert second.save == Execute(world_id="w", run_id="r", name="n", code="1").save == []


def test_an_answer_can_be_numbered_while_it_is_encoded() -> None:
    for message in SOME:
        assert Decoder().feed(encode(message, reply_to=7)) == [dataclasses.replace(message, reply_to=7)]


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


def test_a_large_payload_is_not_copied_into_text() -> None:
    payload = random.Random(0).randbytes(20 << 20)
    frame = encode(Done(payload=payload))
    assert len(frame) < len(payload) + 200
    decoder = Decoder()
    received = [message for at in range(0, len(frame), 1 << 16) for message in decoder.feed(frame[at : at + (1 << 16)])]
    assert received == [Done(payload=payload)]


def test_nothing_comes_out_before_it_is_complete() -> None:
    decoder, frame = Decoder(), encode(SOME[1])
    assert decoder.feed(frame[:-1]) == []
    assert decoder.feed(frame[-1:]) == [SOME[1]]


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"\xff" * 100,
        struct.pack("!II", 2, 0) + b"[]",
        struct.pack("!II", 2, 0) + b"{}",
        struct.pack("!II", 4, 0) + b"null",
        struct.pack("!II", 3, 0) + b"\xff\xfe\xfd",
        struct.pack("!II", 10, 0) + b'{"type":1}',
        struct.pack("!II", 13, 0) + b'{"type":["x"]',
        struct.pack("!II", 15, 0) + b'{"type":"Pull"}',
        struct.pack("!II", 18, 0) + b'{"type":"Message"}',
    ],
)
def test_garbage_is_a_value_error_and_nothing_worse(garbage: bytes) -> None:
    with pytest.raises(ValueError):
        Decoder().feed(garbage)


def test_a_field_of_a_later_version_is_passed_over() -> None:
    body = b'{"type":"Refused","reason":"r","invented_later":1}'
    assert Decoder().feed(struct.pack("!II", len(body), 0) + body) == [Refused(reason="r")]


def test_a_field_cannot_stand_in_for_the_payload() -> None:
    body = b'{"type":"Done","payload":"x"}'
    assert Decoder().feed(struct.pack("!II", len(body), 0) + body) == [Done()]
