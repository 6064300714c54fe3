"""Ranks that another agent hosts, as their leader sees them."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jupyter_llmcloud.agent.failover.follower_link import FollowerLink
from jupyter_llmcloud.agent.ranks.local_group import GroupSpec, RankEvents, renumber
from jupyter_llmcloud.core.run.exits import LOST_AGENT
from jupyter_llmcloud.core.scheduling.placement import agent_key
from jupyter_llmcloud.errors import ConnectionLost
from jupyter_llmcloud.protocol.frames import Message, decode, encode
from jupyter_llmcloud.protocol.rank_messages import (
    AgentLeaves,
    FromRank,
    HostRanks,
    KillRank,
    ProbeRank,
    RankExited,
    RenumberRanks,
    ToRank,
)


class RemoteGroup:
    """Ranks of a world on another agent: the interface of LocalGroup, over a link to that agent."""

    def __init__(self, address: str, spec: GroupSpec, events: RankEvents, lease_s: float) -> None:
        self.links: dict[int, RemoteRank] = {}
        self.num_threads: dict[int, int] = {}
        self.leading = FollowerLink(address, spec.world_id, lease_s, self._dispatch, self._lost)
        self.agent = ""  # its key, once it has forked ranks
        self._spec = spec
        self._events = events

    @property
    def gone(self) -> str:
        """Why the agent is not there any more, "" while it is."""
        return self.leading.gone

    async def start(
        self, ranks: Sequence[int], local_ranks: Sequence[int], num_threads: Mapping[int, int]
    ) -> dict[int, int]:
        """Have the following agent fork ranks, those that are named with a number of threads; returns their pids."""
        if self.gone:
            raise ConnectionLost(self.gone)
        self.leading.begin()
        known = {rank: num_threads[rank] for rank in ranks if rank in num_threads}
        request = HostRanks(ranks=list(ranks), local_ranks=list(local_ranks), num_threads=known, **vars(self._spec))
        hosted = await self.leading.ask(request)
        self.agent = agent_key(hosted.host, hosted.address)
        for rank in ranks:
            self.num_threads[rank] = hosted.num_threads[rank]
            self.links[rank] = RemoteRank(self, rank, hosted.pids[rank], hosted.host)
        return hosted.pids

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """Its ranks have these numbers from now on: {old: new}."""
        renumber(self.links, self.num_threads, numbers)
        own = {old: new for old, new in numbers.items() if new in self.links}
        self.leading.send(RenumberRanks(world_id=self._spec.world_id, numbers=own))

    def to_rank(self, rank: int, message: Message) -> None:
        """Send to one of its ranks."""
        self.leading.send(ToRank(world_id=self._spec.world_id, rank=rank, payload=encode(message)))

    def kill(self, rank: int) -> None:
        """End one of its ranks now."""
        self.leading.send(KillRank(world_id=self._spec.world_id, rank=rank))

    def look(self, rank: int, dump: bool) -> None:
        """Look at the process of one of its ranks."""
        self.leading.send(ProbeRank(world_id=self._spec.world_id, rank=rank, dump=dump))

    def _lost(self, reason: str) -> None:
        for rank, link in list(self.links.items()):
            # The reason has the socket on this host that leads there: the user knows the host.
            named = reason.replace(LOST_AGENT, f"{LOST_AGENT} on host {link.describe()['host']}", 1)
            self._events.on_exit(rank, -signal.SIGKILL, named)

    def _dispatch(self, message: Message) -> None:
        match message:
            case FromRank():
                self._events.on_message(message.rank, decode(message.payload))
            case AgentLeaves() if self.links:
                self._events.on_message(min(self.links), message)
            case RankExited():
                self._events.on_exit(message.rank, message.status, message.evidence)

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
        self.leading.close()


class RemoteRank:
    """A rank that another agent hosts."""

    def __init__(self, host: RemoteGroup, rank: int, pid: int, hostname: str) -> None:
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
