"""Ranks that another agent hosts, as their leader sees them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jupyter_llmcloud.agent.client import raise_refusal
from jupyter_llmcloud.agent.connection import AGENT_SOCKET
from jupyter_llmcloud.core.exits import LOST_AGENT
from jupyter_llmcloud.core.frames import Decoder, Message, encode
from jupyter_llmcloud.core.link import Link, Stamp
from jupyter_llmcloud.core.messages import Done, Refused, StopWorld
from jupyter_llmcloud.core.rank_messages import (
    Follow,
    FromRank,
    HostRanks,
    KillRank,
    LookAtRank,
    RankExited,
    Said,
    ToRank,
)
from jupyter_llmcloud.errors import ConnectionLost

BEAT_S = 1.0
CONNECT_AGAIN_S = 0.2


class RemoteRanks:
    """The same face as HostedRanks, over a link to the following agent.

    A connection through other hosts may break and be made again while the agent's ranks train on; one to an agent of
    this host breaks only when that agent has gone.
    """

    def __init__(
        self,
        address: str,
        *,
        world_id: str,
        world_size: int,
        local_world_size: int,
        store: str,
        cwd: str,
        env: dict[str, str],
        on_message: Callable[[int, Message], None],
        on_exit: Callable[[int, int, str], None],
        lease_s: float,
    ) -> None:
        self.address = address
        self.links: dict[int, RemoteRank] = {}
        self.gone = ""  # why the agent is not there any more
        self._world_id = world_id
        self._spec = {
            "world_id": world_id,
            "world_size": world_size,
            "local_world_size": local_world_size,
            "store": store,
            "cwd": cwd,
            "env": env,
        }
        self._on_message = on_message
        self._on_exit = on_exit
        self._lease_s = lease_s
        self._loop = asyncio.get_running_loop()
        self._link = Link(lease_s, self._loop.time())
        self._is_here = Path(address).name == AGENT_SOCKET
        self._writer: asyncio.StreamWriter | None = None  # when the other end has taken the link up
        self._connection: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._answer: asyncio.Future[Message] | None = None

    async def start(self, ranks: Sequence[int], local_ranks: Sequence[int]) -> dict[int, int]:
        """Have the following agent fork ranks; returns their pids."""
        if self.gone:
            raise ConnectionLost(self.gone)
        self._answer = self._loop.create_future()
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._stay_connected()), asyncio.create_task(self._beat())]
        self.say(HostRanks(ranks=list(ranks), local_ranks=list(local_ranks), reply_to=1, **self._spec))  # type: ignore[arg-type]
        answer = await self._answer
        if isinstance(answer, Refused):
            raise_refusal(answer)
        assert isinstance(answer, Done)
        pids = {int(rank): pid for rank, pid in answer.values["pids"].items()}
        for rank in ranks:
            self.links[rank] = RemoteRank(self, rank, pids[rank], answer.values["host"])
        return pids

    def say(self, message: Message) -> None:
        """Send to the following agent."""
        if not self.gone:
            word = encode(message)
            self._write(self._link.say(word, self._loop.time()), word)

    def _write(self, stamp: Stamp, word: bytes = b"") -> None:
        if self._writer is not None:
            self._writer.write(encode(Said(**stamp.__dict__, payload=word)))

    def to_rank(self, rank: int, message: Message) -> None:
        """Send to one of its ranks."""
        self.say(ToRank(world_id=self._world_id, rank=rank, payload=encode(message)))

    def kill(self, rank: int) -> None:
        """End one of its ranks now."""
        self.say(KillRank(world_id=self._world_id, rank=rank))

    def look(self, rank: int, dump: bool) -> None:
        """Look at the process of one of its ranks."""
        self.say(LookAtRank(world_id=self._world_id, rank=rank, dump=dump))

    # --- the connection ---

    async def _stay_connected(self) -> None:
        while not self.gone:
            reason = ""
            try:
                reader, self._connection = await asyncio.open_unix_connection(self.address)
                try:
                    reason = await self._listen(reader, self._connection)
                finally:
                    self._disconnect()
            except (OSError, ValueError) as error:
                reason = str(error) if self._is_here else ""
            if self._is_here or reason:
                self._lose(reason)
            await asyncio.sleep(CONNECT_AGAIN_S)

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        """Until the connection ends; returns why there is no use in another one, "" when there may be."""
        follow = Follow(
            link_id=self._world_id, lease_s=self._lease_s, received=self._link.received, direct=self._is_here
        )
        writer.write(encode(follow))
        decoder = Decoder()
        while data := await reader.read(1 << 20):
            for message in decoder.feed(data):
                match message:
                    case Said():
                        self._hear(message)
                    case Done():
                        self._writer = writer
                        for stamp, word in self._link.again(message.values["received"], self._loop.time()):
                            self._write(stamp, word)
                    case Refused(error="NotFound"):
                        return message.reason
        return ""

    def _disconnect(self) -> None:
        self._writer = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _beat(self) -> None:
        while not self.gone:
            now = self._loop.time()
            if self._link.is_given_up(now):
                self._lose("it was not heard for too long")
                return
            self._write(self._link.stamp(now))
            await asyncio.sleep(min(BEAT_S, self._lease_s / 8))

    def _lose(self, reason: str) -> None:
        """The agent has gone, or what it hosts has ended by its lease: it has not been heard for longer than that."""
        if self.gone:
            return
        self.gone = f"{LOST_AGENT} at {self.address} has gone{': ' + reason if reason else ''}."
        self._disconnect()
        self._dispatch(Refused(error="ConnectionLost", reason=self.gone))  # who waits for its answer
        for rank in list(self.links):
            self._on_exit(rank, -signal.SIGKILL, self.gone)

    def _hear(self, said: Said) -> None:
        stamp = Stamp(said.number, said.received, said.at, said.echo)
        if self._link.hear(stamp, self._loop.time()):
            for message in Decoder().feed(said.payload):
                self._dispatch(message)

    def _dispatch(self, message: Message) -> None:
        match message:
            case FromRank():
                for inner in Decoder().feed(message.payload):
                    self._on_message(message.rank, inner)
            case RankExited():
                self._on_exit(message.rank, message.status, message.evidence)
            case Done() | Refused():
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)

    # --- the end ---

    def drop(self, ranks: Iterable[int]) -> None:
        """End some ranks."""
        for rank in ranks:
            self.kill(rank)
            del self.links[rank]
        if not self.links:
            self.close()

    def close(self) -> None:
        """End every rank there."""
        self.say(StopWorld(world_id=self._world_id))
        for task in self._tasks:
            task.cancel()
        self._disconnect()  # what was said is sent first
        self.gone = self.gone or "The world has ended."


class RemoteRank:
    """One of them."""

    def __init__(self, host: RemoteRanks, rank: int, pid: int, hostname: str) -> None:
        self.rank = rank
        self._host = host
        self._pid = pid
        self._hostname = hostname

    def send(self, message: Message) -> None:
        self._host.to_rank(self.rank, message)

    def kill(self) -> None:
        self._host.kill(self.rank)

    def look(self, dump: bool = False) -> None:
        self._host.look(self.rank, dump)

    def drain(self) -> None:
        pass  # its agent forwards in order

    def describe(self) -> dict[str, Any]:
        return {"pid": self._pid, "host": self._hostname}
