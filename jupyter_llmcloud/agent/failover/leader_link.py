"""Ranks that this agent hosts for a leader elsewhere: they live for as long as the leader proves that it is there."""

from __future__ import annotations

import asyncio
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jupyter_llmcloud.core.scheduling.lease_link import Link, Stamp
from jupyter_llmcloud.errors import LLMCloudError, NotFound
from jupyter_llmcloud.protocol.agent_messages import Done, Refused, StopWorld
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Decoder, Message, encode
from jupyter_llmcloud.protocol.rank_messages import (
    Follow,
    FromRank,
    HostRanks,
    KillRank,
    LookAtRank,
    RankExited,
    Said,
    StandBy,
    ToRank,
)

if TYPE_CHECKING:
    from jupyter_llmcloud.agent.agent import Agent
    from jupyter_llmcloud.agent.ranks.local_group import HostedRanks

Answer = Callable[["LeaderLink", Message], Awaitable[Message | None]]


class LeaderLink:
    """The follower's end of a link.

    Args:
        answer: carries out what the leader asks.
        end: ends the ranks, when the leader has gone.

    Attributes:
        stands_by: the run to be led from here when the leader has gone.
    """

    def __init__(self, follow: Follow, answer: Answer, end: Callable[[LeaderLink], None]) -> None:
        self.link_id = follow.link_id
        self.hosted: HostedRanks | None = None
        self.stands_by: StandBy | None = None
        self._loop = asyncio.get_running_loop()
        self._link = Link(follow.lease_s, self._loop.time())
        self._direct = follow.direct
        self._answer = answer
        self._end = end
        self._connection: Connection | None = None
        self._has_seen_end = False
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, connection: Connection, received: int) -> int | None:
        """The leader has connected; returns what was heard of it, None when it comes too late."""
        if not self._link.check(self._loop.time()):
            return None
        before, self._connection = self._connection, connection
        if before is not None and before is not connection:
            before.close()
        for stamp, word in self._link.again(received, self._loop.time()):
            self._write(stamp, word)
        return self._link.received

    def detach(self, connection: Connection) -> None:
        """A connection has ended; only one of this host says by that that the leader has."""
        if connection is self._connection:
            self._connection = None
            if self._direct:
                self._has_seen_end = True
                self._end(self)

    @property
    def takes_over_at(self) -> float:
        """When the leader has surely gone (seconds of the loop's clock), and no rank of the run is left elsewhere."""
        if self._has_seen_end and self.stands_by is not None:
            return self._loop.time() + self.stands_by.wait_s
        return self._link.takes_over_at

    def send(self, message: Message) -> None:
        """Say something to the leader."""
        word = encode(message)
        self._write(self._link.say(word, self._loop.time()), word)

    def _write(self, stamp: Stamp, word: bytes = b"") -> None:
        if self._connection is not None:
            self._connection.send(Said(**stamp.__dict__, payload=word))

    def hear(self, said: Said) -> None:
        """The leader says something."""
        now = self._loop.time()
        new = self._link.hear(Stamp(said.number, said.received, said.at, said.echo), now)
        if not self._link.check(now):
            self._end(self)
        elif new:
            for message in Decoder().feed(said.payload):
                task = asyncio.create_task(self._serve(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, message: Message) -> None:
        answer = await self._answer(self, message)
        if answer is not None:
            self.send(answer)

    def beat(self) -> None:
        """Called every second: say that we are here, and let the ranks live on, or end them."""
        now = self._loop.time()
        if not self._link.check(now):
            self._end(self)
            return
        self._write(self._link.stamp(now))
        if self.hosted is not None:
            self.hosted.live_until(self._link.expires_at)


class Followings:
    """The leaders elsewhere whose ranks are here."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._by_link: dict[str, LeaderLink] = {}
        self._by_connection: dict[Connection, LeaderLink] = {}

    @property
    def stands_by(self) -> list[str]:
        """The runs that this agent leads when their leader has gone."""
        told = [following.stands_by for following in self._by_link.values()]
        return [Path(run.folder).name for run in told if run is not None]

    def follow(self, message: Follow, connection: Connection) -> Message:
        """A leader speaks for the first time, or on another connection."""
        following = self._by_link.get(message.link_id)
        if following is None and not message.received:
            following = self._by_link[message.link_id] = LeaderLink(message, self._answer, self._end)
        received = following.attach(connection, message.received) if following is not None else None
        if following is None or received is None:
            raise NotFound("its ranks of this world have ended, since their leader was not heard for too long.")
        self._by_connection[connection] = following
        return Done(values={"received": received})

    def hear(self, said: Said, connection: Connection) -> None:
        """A leader says something."""
        if following := self._by_connection.get(connection):
            following.hear(said)

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        if following := self._by_connection.pop(connection, None):
            following.detach(connection)

    def beat(self) -> None:
        """Called every second."""
        for following in list(self._by_link.values()):
            following.beat()

    def _end(self, following: LeaderLink) -> None:
        if self._by_link.pop(following.link_id, None) is None:
            return
        if following.hosted is not None:
            following.hosted.close()
        if following.stands_by is not None:
            self._agent.takeovers.expect(following.stands_by, following.takes_over_at)

    async def _answer(self, following: LeaderLink, message: Message) -> Message | None:
        try:
            answer = await self._carry_out(following, message)
        except LLMCloudError as error:
            answer = Refused(error=type(error).__name__, reason=str(error))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            answer = Refused(reason=f"the node agent failed on {type(message).__name__}: {error!r}")
        return replace(answer, reply_to=message.reply_to) if answer is not None else None

    async def _carry_out(self, following: LeaderLink, message: Message) -> Message | None:
        ranks = following.hosted.links if following.hosted is not None else {}
        match message:
            case HostRanks():
                return await self._host(following, message)
            case ToRank() if message.rank in ranks:
                for inner in Decoder().feed(message.payload):
                    ranks[message.rank].send(inner)
            case KillRank() if message.rank in ranks:
                ranks[message.rank].kill()
            case LookAtRank() if message.rank in ranks:
                ranks[message.rank].look(message.dump)
            case StandBy():
                following.stands_by = message if message.folder else None
            case StopWorld():
                following.stands_by = None
                self._end(following)
        return None

    async def _host(self, following: LeaderLink, message: HostRanks) -> Message:
        world_id = message.world_id
        if following.hosted is None:
            following.hosted = self._agent.host_ranks(
                world_id=world_id,
                world_size=message.world_size,
                local_world_size=message.local_world_size,
                store=message.store,
                cwd=message.cwd,
                env=message.env,
                on_message=lambda rank, inner: following.send(
                    FromRank(world_id=world_id, rank=rank, payload=encode(inner))
                ),
                on_exit=lambda rank, status, evidence: following.send(
                    RankExited(world_id=world_id, rank=rank, status=status, evidence=evidence)
                ),
            )
        following.beat()
        known = {int(rank): number for rank, number in message.num_threads.items()}
        pids = await following.hosted.start(message.ranks, message.local_ranks, known)
        if self._by_link.get(following.link_id) is not following:
            following.hosted.close()  # the leader has gone meanwhile
        return Done(
            values={
                "pids": {str(rank): pid for rank, pid in pids.items()},
                "host": socket.gethostname(),
                "num_threads": {str(rank): following.hosted.num_threads[rank] for rank in pids},
            }
        )
