"""The ranks of worlds on this agent, for the leader of each world wherever it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from jupyter_llmcloud import config
from jupyter_llmcloud.agent.ranks.devices import Devices
from jupyter_llmcloud.agent.ranks.local_rank import LocalRank
from jupyter_llmcloud.agent.ranks.zygote_client import ZygoteClient
from jupyter_llmcloud.errors import WorldError
from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rank_messages import ForkRank, LeaseUntil, Preempted
from jupyter_llmcloud.storage.runs import nonce

# By these, libraries know that their processes have been launched: they start none, and find the other ranks. The rest
# of what torchrun sets is told when the ranks join (see RankGroups). What a rank starts meets in a store of its own.
_AS_TORCHRUN = {
    "ROLE_NAME": "default",
    "TORCHELASTIC_RESTART_COUNT": 0,
    "TORCHELASTIC_MAX_RESTARTS": 0,
    "TORCHELASTIC_USE_AGENT_STORE": False,
}


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """The ranks of one world on one agent; `store` is `host:port` of the world's TCPStore."""

    world_id: str
    world_size: int
    local_world_size: int
    store: str
    cwd: str
    env: dict[str, str]


class RankEvents(NamedTuple):
    """What is called with (rank, message) of a rank, and with (rank, status, evidence) when it has ended."""

    on_message: Callable[[int, Message], None]
    on_exit: Callable[[int, int, str], None]


class _Numbered(Protocol):
    rank: int


_Link = TypeVar("_Link", bound=_Numbered)


def renumber(links: dict[int, _Link], num_threads: dict[int, int], numbers: Mapping[int, int]) -> None:
    """Give these ranks new numbers, in place: {old: new}."""
    moved = {numbers.get(rank, rank): link for rank, link in links.items()}
    threads = {numbers.get(rank, rank): number for rank, number in num_threads.items() if rank in links}
    for rank, link in moved.items():
        link.rank = rank
    links.clear()
    links.update(moved)
    num_threads.clear()
    num_threads.update(threads)


class LocalGroup:
    """Forks ranks, hears of their exits, gives their slots back."""

    def __init__(self, zygote: ZygoteClient, devices: Devices, spec: GroupSpec, events: RankEvents) -> None:
        self.gone = ""  # as of RemoteGroup
        self.until: float | None = None  # as of LiveUntil, for ranks whose leader is elsewhere
        self.num_threads: dict[int, int] = {}
        self.links: dict[int, LocalRank] = {}
        self._zygote = zygote
        self._devices = devices
        self._spec = spec
        self._events = events
        self._forks = 0
        self._leaving: list[LocalRank] = []
        self._is_closed = False
        self._slots = devices.take(spec.world_id, spec.local_world_size)

    async def start(
        self, ranks: Sequence[int], local_ranks: Sequence[int], num_threads: Mapping[int, int]
    ) -> dict[int, int]:
        """Fork ranks, those that are named with a number of threads; returns their pids."""
        usual = self._devices.threads_per_rank(self._spec.local_world_size)
        await asyncio.shield(self._zygote.warm())  # it takes seconds at first, and `until` is of this moment
        for rank, local_rank in zip(ranks, local_ranks, strict=True):
            self._check_open()
            self._forks += 1
            self.num_threads[rank] = num_threads.get(rank, usual)
            request = self._request(f"{self._spec.world_id}/{rank}/{self._forks}", rank, local_rank)
            link = LocalRank(rank, request.name, self._events.on_message)
            self.links[rank] = link
            await link.start(self._zygote, request)
            if self._is_closed:  # meanwhile, before there was anything to kill
                link.kill()
            self._check_open()
        return {rank: self.links[rank].pid for rank in ranks}

    def _check_open(self) -> None:
        if self._is_closed:
            raise WorldError("the world has been stopped.")

    def _request(self, name: str, rank: int, local_rank: int) -> ForkRank:
        gpu = self._devices.has_gpus
        host, port = self._spec.store.rsplit(":", 1)
        env: dict[str, object] = {
            **self._spec.env,
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": self._spec.world_size,
            "LOCAL_WORLD_SIZE": self._spec.local_world_size,
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            **_AS_TORCHRUN,
            "TORCHELASTIC_RUN_ID": self._spec.world_id.partition("#")[0],
            "OMP_NUM_THREADS": self.num_threads[rank],
            "TOKENIZERS_PARALLELISM": "false",
        }
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(self._slots)} if gpu else {"ACCELERATE_USE_CPU": "true"}
        if host.startswith("127."):
            env["GLOO_SOCKET_IFNAME"] = self._devices.loopback
        elif interface := self._devices.interface_with(self._devices.address):
            env |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        return ForkRank(
            name=name,
            rank=rank,
            world_size=self._spec.world_size,
            store=self._spec.store,
            until=self.until,
            gpu=gpu,
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo",
            cwd=self._spec.cwd,
            sockets=str(config.runtime_dir() / "ranks" / nonce()),
            env={name: str(value) for name, value in env.items()},
        )

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """Its ranks have these numbers from now on: {old: new}."""
        renumber(self.links, self.num_threads, numbers)

    def outlive_sigterm(self) -> None:
        """The ranks go on until this agent ends them."""
        for rank in self.links.values():
            rank.send(Preempted())

    def live_until(self, until: float | None) -> None:
        """When the ranks end by themselves, unless they are told a later time before."""
        self.until = until
        for rank in self.links.values():
            rank.send(LeaseUntil(until=until))

    def exited(self, name: str, status: int) -> bool:
        """A forked process has ended; returns whether it was one of these ranks."""
        for rank, link in self.links.items():
            if link.name == name:
                link.closed()
                self._events.on_exit(rank, status, link.evidence(status))
                return True
        for link in self._leaving:
            if link.name == name:
                link.closed()
                self._leaving.remove(link)
                return True
        return False

    def ranks(self) -> Iterator[tuple[int, int, str]]:
        """(rank, pid, slot) of each."""
        for (rank, link), slot in zip(sorted(self.links.items()), self._slots, strict=False):
            if link.alive:
                yield rank, link.pid, slot

    @property
    def is_over(self) -> bool:
        """No rank is left here."""
        return not self.links and not self._leaving

    def drop(self, ranks: Iterable[int]) -> None:
        """End some ranks, the highest, and give their slots back."""
        for rank in ranks:
            link = self.links.pop(rank)
            link.leave()
            link.kill()
            self._leaving.append(link)
        self._devices.give_back(self._spec.world_id, keep=len(self.links))

    def close(self) -> None:
        """End every rank and give the slots back."""
        self._is_closed = True
        self.drop(list(self.links))


class LocalGroups:
    """All ranks that this agent hosts, of whatever world."""

    def __init__(self, zygote: ZygoteClient, devices: Devices) -> None:
        self._zygote = zygote
        self._devices = devices
        self._groups: dict[str, LocalGroup] = {}

    def make(self, spec: GroupSpec, events: RankEvents) -> LocalGroup:
        """Slots for ranks of a world; they are forked when the group is started. Raises Busy."""
        group = self._groups[spec.world_id] = LocalGroup(self._zygote, self._devices, spec, events)
        return group

    def exited(self, name: str, status: int) -> None:
        """A forked process has ended."""
        for world_id, group in list(self._groups.items()):
            if group.exited(name, status):
                if group.is_over:
                    del self._groups[world_id]
                return

    def ranks(self) -> Iterator[tuple[str, int, int, str]]:
        """(world, rank, pid, slot) of each that is hosted here."""
        for group_id, group in self._groups.items():
            for rank, pid, slot in group.ranks():
                yield group_id.partition("#")[0], rank, pid, slot

    def outlive_sigterm(self) -> None:
        """This agent is told to end, and so are its ranks perhaps: they go on until it ends them."""
        for group in self._groups.values():
            group.outlive_sigterm()

    def __bool__(self) -> bool:
        return bool(self._groups)

    def close(self) -> None:
        """End them all."""
        for group in self._groups.values():
            group.close()
