"""Stores by which a cell's own process groups meet: those of processes that it starts, and of torch.distributed.rpc.

A tutorial starts its processes itself, and has them meet at a port that it names. In a cell every rank does so, and the
port is there once: the processes of rank 1 would join those of rank 0. Each rank's have a port of their own here. What
the ranks themselves make by `env://`, as RPC does, meets in the store of their world, as under torchrun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil

from jupyter_llmcloud.system import patching
from jupyter_llmcloud.system.import_hooks import when_imported
from jupyter_llmcloud.training import patches

TARGET = "torch.distributed.rendezvous:_create_c10d_store"
LOWEST, HIGHEST = 1024, 65535
STEP = 1009  # from the port of one rank to that of the next; tutorials count theirs up from 29500
_HELPERS = ("pt_data_worker", "resource_tracker", "forkserver")  # children of a rank that are in no group


class RankPlace(NamedTuple):
    """The rank whose cell has started a process."""

    rank: int
    world_size: int


def port_of(place: RankPlace, port: int) -> int:
    """Where processes of this rank meet that say `port`."""
    return LOWEST + (port - LOWEST + STEP * place.rank) % (HIGHEST + 1 - LOWEST)


def is_own_group(place: RankPlace, rank: int, world_size: int, has_siblings: Callable[[], bool]) -> bool:
    """Whether a process that joins a group with this number is one of several that its rank has started for it.

    Otherwise it is the only one of its rank, in a group over all ranks.
    """
    return (rank, world_size) != (place.rank, place.world_size) or has_siblings()


class CellStores:
    """What the ranks of a cell make beside their group, in the store of their world: each call has a name of its own.

    Ranks must have made as many before: RPC counts its sessions in C++, over the life of a process, and would wait for
    ever for one that has counted otherwise.
    """

    def __init__(self) -> None:
        self._cell = ""
        self._num_here = 0  # in this cell
        self._num_made = 0  # in this process

    def begin(self, run_id: str, generation: int) -> None:
        """A cell is about to be executed."""
        self._cell = f"{run_id}/{generation}"
        self._num_here = 0

    def count(self) -> int:
        """How many were made in this process before the one that is made now, in whatever store."""
        self._num_here += 1
        self._num_made += 1
        return self._num_made - 1

    def met(self, store: Callable[[str], Any], rank: int, world_size: int) -> Any:
        """The store under a prefix of its own, when all have come. Raises RuntimeError when they cannot go on."""
        num_before = self.count()
        made = store(f"{self._cell}/{self._num_here}")
        made.set(f"made/{rank}", str(num_before))
        numbers = [int(made.get(f"made/{other}")) for other in range(world_size)]
        if len(set(numbers)) > 1:
            raise RuntimeError(
                f"torch.distributed.rpc was used {', '.join(map(str, numbers))} times before on the ranks of this "
                "cell, in this order, and can only begin where that is the same number. %world restart begins anew."
            )
        return made


CELL_STORES = CellStores()


def install_in_child(place: RankPlace) -> None:
    """In a process that a rank has started by spawn or forkserver; what is forked has it already."""
    when_imported(patches.OWN_STORES.module, lambda: _install(lambda: place))


def _install(place: Callable[[], RankPlace]) -> None:
    if TARGET not in patching.applied():
        patches.OWN_STORES.apply({TARGET: lambda original: in_child(original, place)})


def in_child(original: Callable[..., Any], place: Callable[[], RankPlace]) -> Callable[..., Any]:
    """torch's function that makes a store, for a process that a rank has started."""

    def _create_c10d_store(hostname: str, port: int, rank: int, world_size: int, *rest: Any, **options: Any) -> Any:
        of = place()
        if not is_own_group(of, rank, world_size, _has_siblings):
            return original(hostname, port, rank, world_size, *rest, **options)
        if rank == 0 and of.rank == 1:
            _explain(of, port)
        return original(hostname, port_of(of, port), rank, world_size, *rest, **options)

    return _create_c10d_store


def _explain(place: RankPlace, port: int) -> None:
    print(
        f"init_process_group: each of the {place.world_size} ranks of this cell has started processes of its own, so "
        f"there are {place.world_size} groups; that of rank {place.rank} meets at port {port_of(place, port)} in place "
        f"of {port}. The ranks are such processes, and have a group: to use them, call the function on each, with "
        "rank and world_size, without starting processes.",
        file=sys.stderr,
        flush=True,
    )


def _has_siblings() -> bool:
    """Whether the process that has started this one has started others that may be in its group."""
    children = psutil.Process(os.getppid()).children()
    return any(not _is_helper(child) for child in children if child.pid != os.getpid())


def _is_helper(process: psutil.Process) -> bool:
    try:
        words = [process.name(), *process.cmdline()]
    except psutil.Error:
        return True  # it has ended
    return any(helper in word for helper in _HELPERS for word in words)
