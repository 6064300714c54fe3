"""The ranks of a world on the agents that host them, here and elsewhere, and the store by which they meet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jupyter_llmcloud.agent.failover.follower_link import FollowerLink
from jupyter_llmcloud.agent.node_services import NodeServices
from jupyter_llmcloud.agent.ranks.local_group import GroupSpec, LocalGroup, RankEvents
from jupyter_llmcloud.agent.ranks.local_rank import RankLink
from jupyter_llmcloud.agent.ranks.remote_group import RemoteGroup
from jupyter_llmcloud.agent.world.store import is_elsewhere
from jupyter_llmcloud.core.names import format_ranks
from jupyter_llmcloud.protocol.agent_messages import StartWorld
from jupyter_llmcloud.protocol.rank_messages import Join
from jupyter_llmcloud.storage.runs import nonce

AGENTS_AT_ONCE = 64  # that are asked to start ranks: a thousand one after another would take minutes


class RankGroups:
    """Starts ranks, replaces those that have died, and finds another place for those whose agent has gone.

    Attributes:
        links: how to reach each rank.
        num_threads: of each rank, kept when it is replaced or moved: sums are rounded alike only on as many threads.
    """

    def __init__(self, node: NodeServices, spec: StartWorld, events: RankEvents) -> None:
        self.links: dict[int, RankLink] = {}
        self.num_threads = dict(spec.num_threads)
        self._node = node
        self._spec = spec
        self._events = events
        self._hosts: list[LocalGroup | RemoteGroup] = []
        self._store = ""
        self._interface = ""  # that ranks have to use since the store has moved
        self._has_moved = False
        self._given_up: list[RemoteGroup] = []  # whose agent has said that it is told to end
        self._left_out: set[str] = set()  # keys of agents that get no ranks any more

    @property
    def has_store(self) -> bool:
        """Whether ranks can meet again."""
        return self._node.has_store(self._spec.world_id)

    async def start(self, allocations: Sequence[dict[str, Any]], world_size: int) -> None:
        """Fork ranks on every agent; their numbers go on from those that there are."""
        await self._have_store(allocations)
        first, starts = len(self.links), []
        for allocation in allocations:
            ranks = list(range(first, first + allocation["num_ranks"]))
            starts.append((self._group_of(allocation.get("home", allocation["address"]), ranks, world_size), ranks))
            first += len(ranks)
        await self._begin_all(starts)

    async def _have_store(self, allocations: Sequence[dict[str, Any]]) -> None:
        """Ranks of other hosts cannot speak to a store on loopback: then have another, which is told by `join`."""
        if not self._store:
            self._store = await self._node.start_store(self._spec.world_id, allocations)
        elif self._store.startswith("127.") and is_elsewhere(allocations):
            self._node.end_store(self._spec.world_id)
            self._store = await self._node.start_store(self._spec.world_id, allocations)
            self._interface = self._node.interface_name()
            self._has_moved = True

    def _group_of(self, address: str, ranks: list[int], world_size: int) -> LocalGroup | RemoteGroup:
        """Ranks on one agent, not started yet."""
        # Never the name of a former leader's group: its agent may still hear of the ends of that one's ranks.
        group = GroupSpec(
            world_id=f"{self._spec.world_id}#{nonce()}",
            world_size=world_size,
            local_world_size=len(ranks),
            store=self._store,
            cwd=self._spec.cwd,
            env=self._spec.env,
        )
        host: LocalGroup | RemoteGroup
        if address == self._node.address:
            host = self._node.host_ranks(group, self._events)
        else:
            host = RemoteGroup(address, group, self._events, self._spec.link_lease_s)
        self._hosts.append(host)
        return host

    async def _begin_all(self, starts: Sequence[tuple[LocalGroup | RemoteGroup, list[int]]]) -> None:
        """Fork on several agents at once. Raises what the first one raises for which it cannot be done."""
        asked = asyncio.Semaphore(AGENTS_AT_ONCE)

        async def begin(host: LocalGroup | RemoteGroup, ranks: list[int]) -> None:
            async with asked:
                await self._begin(host, ranks)

        try:
            async with asyncio.TaskGroup() as group:
                for host, ranks in starts:
                    group.create_task(begin(host, ranks))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        in_order = dict(sorted(self.links.items()))
        self.links.clear()
        self.links.update(in_order)

    async def _begin(self, host: LocalGroup | RemoteGroup, ranks: list[int]) -> None:
        try:
            await host.start(ranks, list(range(len(ranks))), self.num_threads)
        except BaseException:
            self._hosts.remove(host)
            host.close()
            raise
        self.links.update(host.links)
        self.num_threads.update(host.num_threads)

    def join(self, generation: int, world_size: int) -> None:
        """Have every rank join the process group of a generation."""
        store = self._store if self._has_moved else ""
        places = self._places(world_size)
        for rank, link in self.links.items():
            env = {name: str(value) for name, value in places.get(rank, {}).items()}
            link.send(
                Join(
                    generation=generation,
                    world_size=world_size,
                    rank=rank,
                    env=env,
                    store=store,
                    interface=self._interface,
                )
            )

    def _places(self, world_size: int) -> dict[int, dict[str, int]]:
        """Where each rank is, in torchrun's variables; a group is what one agent has started at once."""
        groups = [sorted(host.links) for host in self._hosts if host.links]
        return {
            rank: {
                "RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": len(ranks),
                "GROUP_RANK": number,
                "GROUP_WORLD_SIZE": len(groups),
                "ROLE_RANK": rank,
                "ROLE_WORLD_SIZE": world_size,
            }
            for number, ranks in enumerate(groups)
            for rank in ranks
        }

    async def replace(self, ranks: list[int], world_size: int, slots: Sequence[dict[str, Any]] = ()) -> list[str]:
        """New processes for ranks that have died, elsewhere if their agent has gone; says which of them have moved."""
        self._hosts = [host for host in self._hosts if not host.gone]
        owners = {rank: host for host in self._hosts for rank in host.links}
        displaced = self.displaced(ranks)
        notes = await self._move(displaced, world_size, slots) if displaced else []
        for rank in ranks:
            if rank in owners:
                await owners[rank].start([rank], [list(owners[rank].links).index(rank)], self.num_threads)
                self.links[rank] = owners[rank].links[rank]
        return notes

    def displaced(self, ranks: Iterable[int]) -> list[int]:
        """Those of these ranks whose agent has gone."""
        hosted = {rank for host in self._hosts if not host.gone for rank in host.links}
        return [rank for rank in ranks if rank not in hosted]

    def was_announced(self, ranks: Iterable[int]) -> bool:
        """Whether the agents of all of these ranks that have gone were told to end."""
        lost = set(self.displaced(ranks))
        gone = [host for host in self._hosts if host.gone and lost & set(host.links)]
        return bool(gone) and all(host in self._given_up for host in gone)

    async def _move(self, ranks: list[int], world_size: int, slots: Sequence[dict[str, Any]]) -> list[str]:
        fits = sum(allocation["num_ranks"] for allocation in slots) == len(ranks)  # others may have lost theirs since
        allocations = slots if fits else await self.find_capacity(len(ranks))
        await self._have_store(allocations)
        notes = []
        for allocation in allocations:
            moving, ranks = ranks[: allocation["num_ranks"]], ranks[allocation["num_ranks"] :]
            host = self._group_of(allocation["home"], moving, world_size)
            await self._begin(host, moving)
            notes.append(f"rank{'s' if len(moving) > 1 else ''} {format_ranks(moving)} moved to {allocation['host']}.")
        return notes

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """Go on with these ranks under new numbers, {old: new}, without those whose agent has gone."""
        self._hosts = [host for host in self._hosts if not host.gone]
        for host in self._hosts:
            host.renumber(numbers)
        links = {rank: link for host in self._hosts for rank, link in host.links.items()}
        threads = {new: self.num_threads[old] for old, new in numbers.items() if old in self.num_threads}
        self.links.clear()
        self.links.update({rank: links[rank] for rank in sorted(links)})
        self.num_threads.clear()
        self.num_threads.update(threads)

    async def find_capacity(
        self, num_ranks: int, given: Sequence[dict[str, Any]] = (), at_once: bool = False, at_least: int = 0
    ) -> list[dict[str, Any]]:
        """Slots in the cluster, or those `given` when nobody here can be asked. Raises Busy when there are none."""
        if given and not self._node.can_ask_cluster:
            return list(given)
        # How others are reached from here is known here alone.
        return await self._node.find_capacity(num_ranks, at_once, at_least, self._left_out)

    def keep_out(self, agents: Iterable[str]) -> None:
        """These agents, by their keys, get no ranks from now on."""
        self._left_out |= set(agents)

    def beside(self, rank: int) -> list[int]:
        """The ranks that the agent of this one hosts, itself among them."""
        agent = self.agent_of(rank)
        return [one for host in self._hosts if self._key_of(host) == agent for one in host.links]

    @property
    def left_out_in_words(self) -> str:
        """What a message says besides when there is no room; "" while every agent may have ranks."""
        hosts = sorted({agent.partition(":")[0] for agent in self._left_out})
        return f" beside what is left out as slow (on {', '.join(hosts)})" if hosts else ""

    def agent_of(self, rank: int) -> str:
        """The key of the agent that hosts this rank; "" when none does."""
        return next((self._key_of(host) for host in self._hosts if rank in host.links), "")

    def leave_out(self, agent: str) -> None:
        """End the ranks of an agent: they are displaced, and it gets none again."""
        self.keep_out([agent])
        for host in [host for host in self._hosts if self._key_of(host) == agent]:
            host.drop(list(host.links))
            self._hosts.remove(host)

    def _key_of(self, host: LocalGroup | RemoteGroup) -> str:
        return host.agent if isinstance(host, RemoteGroup) else self._node.key

    def drop(self, num_ranks: int) -> None:
        """End the ranks from this number on."""
        for host in self._hosts:
            host.drop([rank for rank in sorted(host.links, reverse=True) if rank >= num_ranks])
        for rank in [rank for rank in self.links if rank >= num_ranks]:
            del self.links[rank], self.num_threads[rank]

    @property
    def followers(self) -> list[FollowerLink]:
        """The links to the other agents that host ranks."""
        return [host.leading for host in self._hosts if isinstance(host, RemoteGroup)]

    def live_until(self, until: float | None) -> None:
        """The ranks of this agent end at this time of its clock (None: they do not), unless they are told another."""
        for host in self._hosts:
            if isinstance(host, LocalGroup) and (until is not None or host.until is not None):
                host.live_until(until)

    def give_up(self, rank: int, reason: str) -> None:
        """Do without the agent elsewhere that hosts this rank."""
        for host in self._hosts:
            if isinstance(host, RemoteGroup) and rank in host.links:
                host.leading.give_up(reason)
                self._given_up.append(host)

    def leave(self) -> None:
        """End the ranks of this agent; those elsewhere end when they notice that it has gone."""
        for host in self._hosts:
            if isinstance(host, RemoteGroup):
                host.leading.leave()
            else:
                host.close()
        self._node.end_store(self._spec.world_id)

    def reset(self) -> None:
        """End every rank, and be as before the first was started."""
        self.close()
        self._hosts.clear()
        self.links.clear()
        self._store = ""

    def close(self) -> None:
        """End every rank."""
        for host in self._hosts:
            host.close()
        self._node.end_store(self._spec.world_id)
