"""The process group of a world: joined for each generation, broken from a side thread, never torn down in C++.

A group is reached through `PrefixStore(f"gen{n}", store)` of the store that the agent owns. Gloo has no abort: a rank
blocked in a collective is released by shutting down the sockets of its group, found as the TCP sockets that appeared
while the group was made. The dead group object is kept for ever, since its destructor joins threads and can deadlock.
"""

from __future__ import annotations

import datetime
import inspect
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.group import own_groups
from jupyter_llmcloud.training.group.no_dns import no_names
from jupyter_llmcloud.training.group.renewed import FormerGroups
from jupyter_llmcloud.training.group.sockets import GroupSockets, shut_down, tcp_sockets

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)  # torch's own default

_dead_groups: list[Any] = []
_torch_init = c10d.init_process_group
_torch_destroy = c10d.destroy_process_group
_torch_new_group = c10d.new_group
_signature = inspect.signature(_torch_init)


class WorldGroup:
    """This rank's place in its world's process group.

    Args:
        store: `host:port` of the TCPStore that the agent owns.
        backend: "gloo" on a CPU, "cpu:gloo,cuda:nccl" on GPUs.
    """

    def __init__(self, store: str, rank: int, world_size: int, backend: str, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.backend = backend
        self.device = device
        self.generation = -1
        self.broken = False
        self._sockets = GroupSockets()
        self._given_up = -1  # the newest generation that not all ranks can join
        self._lock = threading.Lock()
        self._former = FormerGroups(_dead_groups)
        self.move(store)

    def move(self, store: str, interface: str = "") -> None:
        """Meet the other ranks by this store from now on; over `interface`, since they are on other hosts, too."""
        host, port = store.rsplit(":", 1)
        self.address = store
        with self._sockets.of_store(), no_names():
            self.store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        if interface:
            os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "MASTER_ADDR": host}
            os.environ["MASTER_PORT"] = port

    def join(self, generation: int) -> None:
        """Leave the group of an earlier generation, if any, and join this one. Every rank must do so."""
        if dist.is_initialized():
            self._former.remember(dist.get_rank(), dist.get_world_size())
            _bury()
        c10d._world.group_count = 0  # it names what is looked for in the store; one that was not joined has counted
        with self._lock:
            self._sockets.begin_join()
            self.broken = generation <= self._given_up
        try:
            if self.broken:
                raise ConnectionAbortedError(f"not all ranks can join generation {generation} of the group")
            with self.watch_sockets():
                _torch_init(
                    self.backend,
                    store=dist.PrefixStore(f"gen{generation}", self.store),
                    rank=self.rank,
                    world_size=self.world_size,
                    timeout=COLLECTIVE_TIMEOUT,
                    device_id=self.device if self.device.type == "cuda" else None,
                )
                dist.barrier()
        finally:
            self._sockets.end_join()
        self.generation = generation

    def renew_former(self) -> None:
        """Variables that hold groups of an earlier generation use those of this one. Every rank must do so."""
        self._former.renew()

    @contextmanager
    def watch_sockets(self) -> Iterator[None]:
        """Count the TCP sockets opened in the block as the group's."""
        before = tcp_sockets()
        try:
            yield
        finally:
            with self._lock:
                self._sockets.add_since(before)

    def release(self, generation: int = -1) -> None:
        """Break the group: whoever is blocked in a collective gets an error. Called from a side thread.

        One that is to join this generation, or waits for the others to, gets an error, too; its store is useless then.
        """
        with self._lock:
            self.broken = True
            self._given_up = max(self._given_up, generation)
            sockets = self._sockets.to_release()
        shut_down(sockets)
        if "nccl" in self.backend and dist.is_initialized():
            c10d._abort_process_group()

    def store_for(self, prefix: str) -> dist.Store:
        """The world's store for something else than its group; who waits at it is released like those in a group."""
        host, port = self.address.rsplit(":", 1)
        with self.watch_sockets(), no_names():
            return dist.PrefixStore(prefix, dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False))

    @property
    def is_usable(self) -> bool:
        """Whether the next cell can use the group as it is."""
        return dist.is_initialized() and not self.broken


def _bury() -> None:
    _dead_groups.extend(c10d._world.pg_map)
    _torch_destroy()


_current: Callable[[], WorldGroup | None] = lambda: None  # noqa: E731


@contextmanager
def watched_sockets() -> Iterator[None]:
    """Groups that are made in the block, by torch itself too, can be released like the world's."""
    world = _current()
    with world.watch_sockets() if world is not None else nullcontext():
        yield


def own_address() -> str:
    """The address by which the other ranks reach this one: of the interface that leads to the store of the world."""
    world = _current()
    host, port = world.address.rsplit(":", 1) if world is not None else ("127.0.0.1", "1")
    family, kind, protocol, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.connect(target)  # nothing is sent
        return str(sock.getsockname()[0])


def adopt(group: Callable[[], WorldGroup | None]) -> None:
    """Let scripts that make and destroy the default group use the world's own.

    `init_process_group` returns at once when the world has a group, as a launcher's script expects of its first call;
    `destroy_process_group` leaves it in place for the next cell. Groups of a part of the ranks work as in torch, and
    their sockets can be released like the world's. A process that was forked by a cell makes its groups by itself.
    """
    owner = os.getpid()
    free = {owner}  # processes without a group that is another's

    def world_here() -> WorldGroup | None:
        return group() if os.getpid() == owner else None

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        world = world_here()
        if world is not None and dist.is_initialized():
            _compare(_signature.bind(*args, **kwargs).arguments.get("world_size"), world)
            return
        if os.getpid() not in free:
            free.add(os.getpid())
            _bury()
        _torch_init(*args, **kwargs)

    def destroy_process_group(group_to_end: Any = None) -> None:
        if world_here() is None:
            _torch_destroy(group_to_end)
        elif group_to_end is not None and group_to_end is not c10d.GroupMember.WORLD:
            _dead_groups.append(group_to_end)
            _torch_destroy(group_to_end)

    def new_group(*args: Any, **kwargs: Any) -> Any:
        world = world_here()
        if world is None:
            return _torch_new_group(*args, **kwargs)
        with world.watch_sockets():
            return _torch_new_group(*args, **kwargs)

    global _current
    _current = group
    functions = (init_process_group, destroy_process_group, new_group)
    patches.GROUPS.apply_by_name({function.__name__: function for function in functions})
    patches.OWN_STORES.apply({own_groups.TARGET: lambda original: _make_store(original, group, world_here)})


def _compare(wanted: int | None, world: WorldGroup) -> None:
    """Raises ValueError where a script counts on other processes than there are; it would wait for some for ever."""
    if wanted in (None, -1, world.world_size):
        return
    size = world.world_size
    told = f"init_process_group(world_size={wanted}): the group of a cell is that of its world, of {size} ranks"
    if wanted == 1:
        if world.rank == 0:
            print(f"{told}; dist.get_world_size() is {size}.", file=sys.stderr)
        return
    raise ValueError(
        f"{told}. Say world_size=world_size, or change their number first: %world resize {wanted}. A group of some of "
        "the ranks is made by dist.new_group()."
    )


def _make_store(
    original: Callable[..., Any], group: Callable[[], WorldGroup | None], world_here: Callable[[], WorldGroup | None]
) -> Callable[..., Any]:
    """torch's function by which `env://` and `tcp://` find the others, in a rank and in what is forked from it."""

    def place() -> own_groups.RankPlace:
        world = group()
        return own_groups.RankPlace(world.rank, world.world_size) if world is not None else own_groups.RankPlace(0, 1)

    in_child = own_groups.in_child(original, place)

    def _create_c10d_store(hostname: str, port: int, rank: int, world_size: int, *rest: Any, **options: Any) -> Any:
        world = world_here()
        if world is None:
            return in_child(hostname, port, rank, world_size, *rest, **options)
        if f"{hostname}:{port}" != world.address:
            own_groups.CELL_STORES.count()
            return original(hostname, port, rank, world_size, *rest, **options)
        return own_groups.CELL_STORES.met(world.store_for, rank, world_size)

    return _create_c10d_store
