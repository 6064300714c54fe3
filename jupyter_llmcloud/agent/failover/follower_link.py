"""The leader's end of a link: messages to an agent that follows, over connections that may break."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from jupyter_llmcloud.core.run.exits import LOST_AGENT
from jupyter_llmcloud.core.scheduling.lease_link import LeaseLink, LinkHeader
from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError
from jupyter_llmcloud.protocol.agent_messages import StopWorld
from jupyter_llmcloud.protocol.connection import AGENT_SOCKET, Connection
from jupyter_llmcloud.protocol.frames import Message, decode, encode
from jupyter_llmcloud.protocol.rank_messages import Follow, LinkMessage
from jupyter_llmcloud.protocol.rpc import Calls, R, Reply, Request

HEARTBEAT_S = 1.0
CONNECT_AGAIN_S = 0.2


class FollowerLink:
    """Speaks with the agent at `address` until it has gone, is given up, or is not needed any more.

    A connection through other hosts may break and be made again while the agent's ranks train on; one to an agent of
    this host breaks only when that agent has gone.

    Args:
        link_id: names the link there.
        hear: called with what the other end says, but for replies to what is asked here.
        lose: called once with the reason when it has gone.
        hosts: whether it hosts ranks for this link; one that only stands by is given up when it does not hear either.
    """

    def __init__(
        self,
        address: str,
        link_id: str,
        lease_s: float,
        hear: Callable[[Message], None],
        lose: Callable[[str], None],
        *,
        hosts: bool = True,
    ) -> None:
        self.address = address
        self.gone = ""  # why the agent is not there any more
        self._link_id = link_id
        self._dispatch = hear
        self._on_loss = lose
        self._hosts = hosts
        self._loop = asyncio.get_running_loop()
        self._link = LeaseLink(lease_s, self._loop.time())
        self._calls = Calls(f"the node agent at {address}")
        self._connection: Connection | None = None
        self._is_taken_up = False  # by the other end of the connection
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Connect, and stay connected; again it does nothing."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._stay_connected()), asyncio.create_task(self._heartbeat())]

    def send(self, message: Message) -> None:
        """Send to the following agent, now or when it is reached again."""
        if not self.gone:
            frame = encode(message)
            self._write(self._link.send(frame, self._loop.time()), frame)

    async def ask(self, request: Request[R]) -> R:
        """Send a request and wait for its reply, over as many connections as it takes; a refusal is raised."""
        return await self._calls.ask(request, self.send)

    @property
    def is_here(self) -> bool:
        """Whether the agent is on this host."""
        return Path(self.address).name == AGENT_SOCKET

    @property
    def leads_until(self) -> float:
        """Until when nobody at the other end leads in this one's place (seconds of the loop's clock)."""
        return self._link.leads_until

    def _write(self, header: LinkHeader, frame: bytes = b"") -> None:
        if self._connection is not None and self._is_taken_up:
            self._connection.send(LinkMessage(**vars(header), payload=frame))

    # --- the connection ---

    async def _stay_connected(self) -> None:
        while not self.gone:
            try:
                reader, writer = await asyncio.open_unix_connection(self.address)
                reason = await self._follow(Connection(reader, writer, self._calls.peer))
            except OSError as error:
                reason = str(error) if self.is_here else ""
            if self.is_here or reason:
                self._lose(reason)
            await asyncio.sleep(CONNECT_AGAIN_S)

    async def _follow(self, connection: Connection) -> str:
        """Until the connection ends; returns why there is no use in another one, "" when there may be."""
        self._connection = connection
        reading = asyncio.create_task(self._read(connection))
        follow = Follow(
            link_id=self._link_id, lease_s=self._link.lease_s, received=self._link.received, direct=self.is_here
        )
        try:
            followed = await connection.request(follow, None)
            self._is_taken_up = True
            for header, frame in self._link.again(followed.received, self._loop.time()):
                self._write(header, frame)
            await reading
        except ConnectionLost:
            pass
        except LLMCloudError as error:
            return str(error)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            self._disconnect()
        return ""

    async def _read(self, connection: Connection) -> None:
        async for message in connection.messages():
            if isinstance(message, LinkMessage):
                self._hear(message)

    def _hear(self, received: LinkMessage) -> None:
        header = LinkHeader(received.number, received.received, received.at, received.echo)
        if self._link.hear(header, self._loop.time()):
            message = decode(received.payload)
            if isinstance(message, Reply):
                self._calls.take(message)
            else:
                self._dispatch(message)

    def _disconnect(self) -> None:
        self._is_taken_up = False
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _heartbeat(self) -> None:
        while not self.gone:
            now = self._loop.time()
            if self._link.is_given_up(now) or (not self._hosts and self._link.is_unheard(now)):
                self._lose("it was not heard for too long")
                return
            self._write(self._link.header(now))
            await asyncio.sleep(min(HEARTBEAT_S, self._link.lease_s / 8))

    def _lose(self, reason: str) -> None:
        """The agent has gone, or what it hosts has ended by its lease: it has not been heard for longer than that."""
        if self.gone:
            return
        self.gone = f"{LOST_AGENT} at {self.address} has gone{': ' + reason if reason else ''}."
        self._disconnect()
        self._calls.fail(ConnectionLost(self.gone))
        self._on_loss(self.gone)

    def give_up(self, reason: str) -> None:
        """Do without the agent from now on: what it hosts for this link ends."""
        self.send(StopWorld(world_id=self._link_id))
        self._lose(reason)

    def close(self) -> None:
        """It is not needed any more: what it hosts for this link ends."""
        self.send(StopWorld(world_id=self._link_id))
        self.leave()

    def leave(self) -> None:
        """Go, as if by a crash: who stands by at the other end leads from then on."""
        for task in self._tasks:
            task.cancel()
        self._disconnect()  # what was queued is sent first
        self.gone = self.gone or "The world has ended."
        self._calls.fail(ConnectionLost(self.gone))
