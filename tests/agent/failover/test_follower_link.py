"""The leader's end of a link, over sockets that break, refuse, and speak otherwise."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from jupyter_llmcloud.agent.failover.follower_link import FollowerLink
from jupyter_llmcloud.agent.failover.leader_link import LeaderLink
from jupyter_llmcloud.errors import Busy, ConnectionLost, LLMCloudError
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import PROTOCOL_VERSION, Message, encode
from jupyter_llmcloud.protocol.rank_messages import (
    Follow,
    FollowAccepted,
    HostRanks,
    KillRank,
    LinkMessage,
    RankExited,
    RanksHosted,
)
from jupyter_llmcloud.protocol.rpc import Request, Responder, refusal
from jupyter_llmcloud.system.unix_sockets import listen

HOST = HostRanks(world_id="w", ranks=[0], local_ranks=[0], local_world_size=1, world_size=1, store="s:1")
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Link:
    """A link to whatever listens at `path`, and what was heard of it."""

    def __init__(self, path: Path) -> None:
        self.heard: list[Message] = []
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.leading = FollowerLink(str(path), "link", 8.0, self.heard.append, self.lost.set_result)
        self.leading.begin()


def over_a_socket(path: Path, serve: Serve, test: Callable[[Link], Awaitable[None]]) -> None:
    async def within() -> None:
        async def serve_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer)
            finally:
                writer.close()

        server = await listen(str(path), serve_and_close)
        link = Link(path)
        try:
            async with asyncio.timeout(20):
                await test(link)
        finally:
            link.leading.leave()
            server.close()

    asyncio.run(within())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (struct.pack("!2sHII", b"LC", PROTOCOL_VERSION + 1, 0, 0), "version 3 of the protocol, this process version 2"),
        (b'\0\0\0\x0f\0\0\0\0{"type":"Done"}', "does not speak our protocol"),
        (encode(refusal(Busy("nobody listens there"))), "nobody listens there"),
    ],
)
def test_a_follower_that_cannot_be_understood_or_refuses_is_lost_and_why_is_said(
    said: bytes, words: str, tmp_path: Path
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(said)
        await reader.read(1 << 16)

    async def test(link: Link) -> None:
        asked = asyncio.create_task(link.leading.ask(HOST))
        assert words in await link.lost
        with pytest.raises(ConnectionLost, match=words):
            await asked

    over_a_socket(tmp_path / "bridge.sock", serve, test)


def test_a_request_is_answered_over_as_many_connections_as_it_takes(tmp_path: Path) -> None:
    """The first connection ends when the request has come, the reply is said over the second one."""
    followings: list[LeaderLink] = []
    num_connections = 0
    responder = Responder("the follower")
    responder.on(HostRanks, lambda asked: RanksHosted(host="h", pids={0: asked.world_size}, num_threads={0: 2}))

    async def answer(following: LeaderLink, message: Message) -> None:
        if isinstance(message, Request):
            reply = await responder.answer(message)
            assert reply is not None
            following.send(reply)
            following.send(RankExited(world_id="w", rank=0, status=0))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        connection, taken_up = Connection(reader, writer, "the leader"), Responder("the follower")

        def follow(asked: Follow) -> FollowAccepted:
            if not followings:
                followings.append(LeaderLink(asked, answer, lambda _: None))
            received = followings[0].attach(connection, asked.received)
            assert received is not None
            return FollowAccepted(received=received)

        taken_up.on(Follow, follow)
        async for message in connection.messages():
            if isinstance(message, Follow):
                connection.send(await taken_up.answer(message))  # type: ignore[arg-type]
            elif isinstance(message, LinkMessage):
                followings[0].hear(message)
                if num_connections == 1:
                    followings[0].detach(connection)
                    connection.close()
                    return

    async def test(link: Link) -> None:
        hosted = await link.leading.ask(HOST)
        assert (hosted.host, hosted.pids, hosted.num_threads) == ("h", {0: 1}, {0: 2})
        assert num_connections >= 2
        while not link.heard:
            await asyncio.sleep(0)
        assert link.heard == [RankExited(world_id="w", rank=0, status=0)]

    over_a_socket(tmp_path / "bridge.sock", serve, test)


def test_who_still_waits_when_the_link_is_given_up_is_told(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def test(link: Link) -> None:
        asked = asyncio.create_task(link.leading.ask(HOST))
        await asyncio.sleep(0)
        link.leading.send(KillRank(world_id="w", rank=0))
        link.leading.close()
        with pytest.raises(LLMCloudError, match="The world has ended"):
            await asked

    over_a_socket(tmp_path / "bridge.sock", serve, test)
