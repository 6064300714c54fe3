"""What worlds and runs use of the node that they are on: built once by the agent, and passed down."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud.agent.failover.standby import LedRuns
from jupyter_llmcloud.agent.failover.worker_client import WorkerClient
from jupyter_llmcloud.agent.ranks.devices import Devices
from jupyter_llmcloud.agent.ranks.local_group import GroupSpec, LocalGroup, LocalGroups, RankEvents
from jupyter_llmcloud.agent.ranks.zygote_client import ZygoteClient
from jupyter_llmcloud.agent.resources import Ours
from jupyter_llmcloud.agent.world.store import Stores
from jupyter_llmcloud.protocol.connection import Connection


@dataclass(frozen=True)
class NodeServices:
    """The parts of one agent.

    Attributes:
        address: its socket.
        interface: address on which ranks of other hosts reach this one.
        worker: the Dask worker that holds the agent, which knows the cluster.
        led: the runs that are led from here.
    """

    address: str
    interface: str
    devices: Devices
    zygote: ZygoteClient
    stores: Stores
    groups: LocalGroups
    worker: WorkerClient
    led: LedRuns

    @classmethod
    def build(
        cls, folder: Path, address: str, interface: str, num_slots: int | None, stays_s: float = 0.0
    ) -> NodeServices:
        """The parts of an agent whose files are in `folder`; for `stays_s` see ZygoteClient."""

        def on_exit(name: str, status: int) -> None:
            if not stores.exited(name):
                groups.exited(name, status)

        devices = Devices(num_slots, interface)
        zygote = ZygoteClient(folder / "zygote.log", on_exit, stays_s)
        stores = Stores(zygote, folder / "store.log", interface)
        groups = LocalGroups(zygote, devices)
        worker = WorkerClient(address, devices)
        return cls(address, interface, devices, zygote, stores, groups, worker, LedRuns(folder, zygote))

    @property
    def key(self) -> str:
        """Names this agent alike on every host."""
        return self.worker.key

    # --- the agent's own ---

    def warm(self) -> None:
        """Begin to import what ranks need."""
        self.zygote.warm()

    def held_by(self, worker: Connection, finds_capacity: bool) -> bool:
        """A worker renews the agent's lease; returns whether one that knows the cluster does so for the first time."""
        return self.worker.held_by(worker, finds_capacity)

    def forget(self, connection: Connection) -> None:
        """A connection has ended, perhaps a worker's."""
        self.worker.forget(connection)

    @property
    def is_held(self) -> bool:
        """Whether a worker holds this agent."""
        return self.worker.is_there

    @property
    def has_gpus(self) -> bool:
        """Whether a slot is a GPU."""
        return self.devices.has_gpus

    def describe_slots(self) -> dict[str, Any]:
        """For the description of the agent."""
        devices = self.devices
        return {
            "num_slots": len(devices.slots),
            "free_slots": len(devices.free),
            "has_gpus": devices.has_gpus,
            "held": devices.held,
        }

    def processes(self) -> Iterator[Ours]:
        """The processes of ranks that are hosted here, and the one that they are forked from."""
        if (zygote := self.zygote.process) is not None and zygote.poll() is None:
            yield Ours(pid=zygote.pid, kind="zygote")
        for world_id, rank, pid, slot in self.groups.ranks():
            device = self.devices.gpus.index(slot) if self.devices.has_gpus and slot in self.devices.gpus else None
            yield Ours(pid=pid, kind="rank", world_id=world_id, rank=rank, device=device)

    def end_groups(self) -> None:
        """End every rank that is hosted here."""
        self.groups.close()

    def close(self) -> None:
        """End whatever was forked here."""
        self.zygote.close()

    # --- what worlds and runs use ---

    def interface_name(self) -> str:
        """The network interface by which ranks of other hosts reach this one."""
        return self.devices.interface_with(self.interface)

    def host_ranks(self, spec: GroupSpec, events: RankEvents) -> LocalGroup:
        """Slots for ranks of a world on this node. Raises Busy."""
        return self.groups.make(spec, events)

    async def start_store(self, world_id: str, allocations: Sequence[Mapping[str, Any]]) -> str:
        """Start the TCPStore of a world; returns `host:port`."""
        return await self.stores.start(world_id, allocations)

    def has_store(self, world_id: str) -> bool:
        """Whether the process of a world's store is there."""
        return self.stores.is_alive(world_id)

    def end_store(self, world_id: str) -> None:
        """The world needs its store no more."""
        self.stores.end(world_id)

    @property
    def can_ask_cluster(self) -> bool:
        """Whether a worker holds this agent that knows the cluster."""
        return self.worker.can_be_asked

    async def find_capacity(
        self, num_ranks: int, at_once: bool = False, at_least: int = 0, without: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Slots for ranks, anywhere in the cluster; see PlaceRanks. Raises Busy when it has none now."""
        return await self.worker.find(num_ranks, at_once, at_least, without)

    async def find_standby(self) -> str:
        """The socket of another agent that could lead in this one's place; "" when there is none."""
        return await self.worker.find_stand_by()

    def leads(self, folder: Path, wait_s: float) -> None:
        """A run with restarts is led from here; ranks of it may be elsewhere for so long after this agent's end."""
        self.led.leads(folder, wait_s)

    def leads_no_more(self, folder: Path) -> None:
        """It has ended, or is led from elsewhere."""
        self.led.leads_no_more(folder)
