"""Ranks that another agent hosts, as their leader sees them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jupyter_llmcloud.agent.client import raise_refusal
from jupyter_llmcloud.core.frames import Decoder, Message, encode
from jupyter_llmcloud.core.messages import Done, Refused, StopWorld
from jupyter_llmcloud.core.rank_messages import FromRank, HostRanks, KillRank, LookAtRank, RankExited, ToRank
from jupyter_llmcloud.errors import ConnectionLost


class RemoteRanks:
    """The same face as HostedRanks, over a connection to the following agent."""

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
    ) -> None:
        self.address = address
        self.links: dict[int, RemoteRank] = {}
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
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[Message] | None = None

    async def start(self, ranks: Sequence[int], local_ranks: Sequence[int]) -> dict[int, int]:
        """Have the following agent fork ranks; returns their pids."""
        if self._writer is None:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self.address)
            except OSError as error:
                raise ConnectionLost(f"the node agent at {self.address} does not answer: {error}.") from None
            self._listener = asyncio.create_task(self._listen(reader))
        self._answer = asyncio.get_running_loop().create_future()
        self.write(HostRanks(ranks=list(ranks), local_ranks=list(local_ranks), reply_to=1, **self._spec))  # type: ignore[arg-type]
        answer = await self._answer
        if isinstance(answer, Refused):
            raise_refusal(answer)
        assert isinstance(answer, Done)
        pids = {int(rank): pid for rank, pid in answer.values["pids"].items()}
        for rank in ranks:
            self.links[rank] = RemoteRank(self, rank, pids[rank], answer.values["host"])
        return pids

    def write(self, message: Message) -> None:
        """Send to the following agent."""
        if self._writer is not None:
            self._writer.write(encode(message))

    def to_rank(self, rank: int, message: Message) -> None:
        """Send to one of its ranks."""
        self.write(ToRank(world_id=self._world_id, rank=rank, payload=encode(message)))

    def kill(self, rank: int) -> None:
        """End one of its ranks now."""
        self.write(KillRank(world_id=self._world_id, rank=rank))

    def look(self, rank: int, dump: bool) -> None:
        """Look at the process of one of its ranks."""
        self.write(LookAtRank(world_id=self._world_id, rank=rank, dump=dump))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        decoder = Decoder()
        try:
            while data := await reader.read(1 << 20):
                for message in decoder.feed(data):
                    self._dispatch(message)
        except ConnectionError:
            pass
        gone = f"The node agent at {self.address} has gone."
        self._writer = None
        self._dispatch(Refused(error="ConnectionLost", reason=gone))  # who waits for its answer
        for rank in self.links:
            self._on_exit(rank, -signal.SIGKILL, gone)

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

    def drop(self, ranks: Iterable[int]) -> None:
        """End some ranks."""
        for rank in ranks:
            self.kill(rank)
            del self.links[rank]
        if not self.links:
            self.close()

    def close(self) -> None:
        """End every rank there."""
        self.write(StopWorld(world_id=self._world_id))
        if self._listener is not None:
            self._listener.cancel()
        if self._writer is not None:
            self._writer.close()


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
