"""Ranks that this agent hosts for a leader elsewhere: they live for as long as the leader proves that it is there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from jupyter_llmcloud.agent.heartbeats import by_itself
from jupyter_llmcloud.agent.ranks.local_group import GroupSpec, LocalGroup, LocalGroups, RankEvents
from jupyter_llmcloud.core.scheduling.lease_link import LeaseLink, LinkHeader
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.protocol.agent_messages import StopWorld
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Message, Unreadable, decode, encode
from jupyter_llmcloud.protocol.rank_messages import (
    AgentLeaves,
    Follow,
    FollowAccepted,
    FromRank,
    HostRanks,
    KillRank,
    LinkMessage,
    ProbeRank,
    RankExited,
    RanksHosted,
    RenumberRanks,
    StandBy,
    ToRank,
)
from jupyter_llmcloud.protocol.rpc import Request, Responder

Serve = Callable[["LeaderLink", Message], Coroutine[Any, Any, None]]


class LeaderLink:
    """The follower's end of a link.

    Args:
        serve: carries out what the leader says.
        end: ends the ranks, when the leader has gone.

    Attributes:
        stands_by: the run to be led from here when the leader has gone.
    """

    def __init__(self, follow: Follow, serve: Serve, end: Callable[[LeaderLink], None]) -> None:
        self.link_id = follow.link_id
        self.hosted: LocalGroup | None = None
        self.stands_by: StandBy | None = None
        self._loop = asyncio.get_running_loop()
        self._link = LeaseLink(follow.lease_s, self._loop.time())
        self._direct = follow.direct
        self._serve = serve
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
        for header, frame in self._link.again(received, self._loop.time()):
            self._write(header, frame)
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
        """Send to the leader, now or when it has connected again."""
        frame = encode(message)
        self._write(self._link.send(frame, self._loop.time()), frame)

    def _write(self, header: LinkHeader, frame: bytes = b"") -> None:
        if self._connection is not None:
            self._connection.send(LinkMessage(**vars(header), payload=frame))

    def hear(self, received: LinkMessage) -> None:
        """Take a message of the leader."""
        now = self._loop.time()
        new = self._link.hear(LinkHeader(received.number, received.received, received.at, received.echo), now)
        if not self._link.check(now):
            self._end(self)
        elif new:
            task = asyncio.create_task(self._serve(self, decode(received.payload)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def heartbeat(self) -> None:
        """Called every second: say that we are here, and let the ranks live on, or end them."""
        now = self._loop.time()
        if not self._link.check(now):
            self._end(self)
            return
        self._write(self._link.header(now))
        if self.hosted is not None:
            self.hosted.live_until(self._link.expires_at)


class LeaderLinks:
    """The leaders elsewhere whose ranks are here.

    Args:
        groups: the ranks that this agent hosts.
        expect: called with a run that is to be led from here, and when, in seconds of the loop's clock.
        address: of this agent.
    """

    def __init__(self, groups: LocalGroups, expect: Callable[[StandBy, float], None], address: str = "") -> None:
        self._groups = groups
        self._expect = expect
        self._address = address
        self._by_link: dict[str, LeaderLink] = {}
        self._by_connection: dict[Connection, LeaderLink] = {}
        self._responder = Responder("the node agent that follows")
        self._responder.on(HostRanks, self._host)
        self._responder.on(StopWorld, self._stop)

    @property
    def stands_by(self) -> list[str]:
        """The runs that this agent leads when their leader has gone."""
        told = [link.stands_by for link in self._by_link.values()]
        return [Path(run.folder).name for run in told if run is not None]

    def leave(self) -> None:
        """Tell the leaders that this agent is about to end, also those for which it only stands by."""
        for link in self._by_link.values():
            if link.hosted is not None or link.stands_by is not None:
                link.send(AgentLeaves())

    @property
    def hosts_ranks(self) -> bool:
        """Whether a leader still has ranks here."""
        return any(link.hosted is not None for link in self._by_link.values())

    def follow(self, message: Follow, connection: Connection) -> FollowAccepted:
        """A leader speaks for the first time, or on another connection."""
        link = self._by_link.get(message.link_id)
        if link is None and not message.received:
            link = self._by_link[message.link_id] = LeaderLink(message, self._serve, self._end)
        received = link.attach(connection, message.received) if link is not None else None
        if link is None or received is None:
            raise NotFound("its ranks of this world have ended, since their leader was not heard for too long.")
        self._by_connection[connection] = link
        return FollowAccepted(received=received)

    def hear(self, said: LinkMessage, connection: Connection) -> None:
        """A leader says something."""
        if link := self._by_connection.get(connection):
            link.hear(said)

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        if link := self._by_connection.pop(connection, None):
            link.detach(connection)

    def heartbeat(self) -> None:
        """Called every second."""
        for link in list(self._by_link.values()):
            with by_itself():
                link.heartbeat()

    def _end(self, link: LeaderLink) -> None:
        if self._by_link.pop(link.link_id, None) is None:
            return
        if link.hosted is not None:
            link.hosted.close()
        if link.stands_by is not None:
            self._expect(link.stands_by, link.takes_over_at)

    async def _serve(self, link: LeaderLink, message: Message) -> None:
        if isinstance(message, Request | Unreadable):
            await self._responder.serve(message, link.send, link)
        else:
            self._told(link, message)

    @staticmethod
    def _told(link: LeaderLink, message: Message) -> None:
        ranks = link.hosted.links if link.hosted is not None else {}
        match message:
            case ToRank() if message.rank in ranks:
                ranks[message.rank].send(decode(message.payload))
            case KillRank() if message.rank in ranks:
                ranks[message.rank].kill()
            case ProbeRank() if message.rank in ranks:
                ranks[message.rank].look(message.dump)
            case RenumberRanks() if link.hosted is not None:
                link.hosted.renumber(message.numbers)
            case StandBy():
                link.stands_by = message if message.folder else None

    def _stop(self, _: StopWorld, link: LeaderLink) -> None:
        link.stands_by = None
        self._end(link)

    async def _host(self, message: HostRanks, link: LeaderLink) -> RanksHosted:
        world_id = message.world_id
        if link.hosted is None:
            spec = GroupSpec(
                world_id=world_id,
                world_size=message.world_size,
                local_world_size=message.local_world_size,
                store=message.store,
                cwd=message.cwd,
                env=message.env,
            )
            events = RankEvents(
                lambda rank, inner: link.send(FromRank(world_id=world_id, rank=rank, payload=encode(inner))),
                lambda rank, status, evidence: link.send(
                    RankExited(world_id=world_id, rank=rank, status=status, evidence=evidence)
                ),
            )
            link.hosted = self._groups.make(spec, events)
        link.heartbeat()
        pids = await link.hosted.start(message.ranks, message.local_ranks, message.num_threads)
        if self._by_link.get(link.link_id) is not link:
            link.hosted.close()  # the leader has gone meanwhile
        num_threads = {rank: link.hosted.num_threads[rank] for rank in pids}
        return RanksHosted(host=socket.gethostname(), pids=pids, num_threads=num_threads, address=self._address)
