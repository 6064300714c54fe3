"""When what is queued on a connection leaves."""

from __future__ import annotations

import asyncio
from typing import Any

from jupyter_llmcloud.protocol.agent_messages import RankState, RunEnded
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Decoder, Message

DONE = RankState(run_id="r", rank=0, state="done")
ENDED = RunEnded(run_id="r", state="finished")


class Writer:
    """What a connection writes to; it takes everything at once."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.transport = self

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        pass

    @property
    def messages(self) -> list[list[Message]]:
        return [Decoder().feed(piece) for piece in self.pieces]


def connected() -> tuple[Connection, Writer]:
    writer: Any = Writer()
    return Connection(asyncio.StreamReader(), writer, "nobody"), writer


async def flushed() -> tuple[list[list[Message]], list[list[Message]]]:
    """What had left when `flush` returned, and some turns of the loop later."""
    connection, writer = connected()
    connection.send(DONE, hurry=False)
    connection.send(ENDED)
    connection.flush()
    at_once = writer.messages
    connection.flush()
    for _ in range(3):
        await asyncio.sleep(0)
    return at_once, writer.messages


def test_what_somebody_waits_for_leaves_before_the_turn_of_the_loop_is_over() -> None:
    at_once, later = asyncio.run(flushed())
    assert at_once == [[DONE, ENDED]], "in order, and in one piece"
    assert later == at_once, "once"


async def sent_after_a_flush() -> list[list[Message]]:
    connection, writer = connected()
    connection.send(ENDED)
    connection.flush()
    connection.send(DONE)
    await asyncio.sleep(0)
    connection.close()
    connection.flush()
    return writer.messages


def test_what_is_sent_after_it_leaves_as_ever() -> None:
    assert asyncio.run(sent_after_a_flush()) == [[ENDED], [DONE]]
