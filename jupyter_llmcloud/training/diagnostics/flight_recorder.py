"""Which collectives has this rank begun and finished? Read from torch's flight recorder, also for those made in C++.

Nothing is wrapped: what counts is what the backends record themselves, so that the gradient all_reduce of a backward
pass, which no Python function starts, is seen like any other. The recorder knows a group by a number that counts the
groups of this process; the same numbers are counted here, since only the group's name means the same on every rank.
"""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import torch.distributed as dist
from torch._C import _distributed_c10d as recorder
from torch.distributed import distributed_c10d as c10d

from jupyter_llmcloud.training import patches

GroupRow = list[Any]  # [ranks, begun, finished]

_READERS: dict[str, str] = {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}


class FinishedCounts:
    """How many collectives of each group are finished.

    Gloo finishes them in two threads, each of which notes the number of its own: with 7 noted before 6, torch tells 6
    of 7 until the next one, and a rank that does anything else would look like one that waits. So the count never
    falls, and one that lasts is checked: the fourth, eighth, sixteenth ... time that it is seen, since a look at the
    recorder's entries takes 60 ms.
    """

    def __init__(self) -> None:
        self._finished: dict[tuple[str, str], int] = {}
        self._in_flight: dict[tuple[str, str], tuple[int, int, int]] = {}  # begun, finished, how often it was seen so

    def count(self, group: tuple[str, str], begun: int, finished: int, is_done: Callable[[int, int], bool]) -> int:
        """Those of a group, as torch tells them now. `is_done(first, last)`: whether all of these are finished."""
        finished = max(finished, self._finished.get(group, 0))
        if finished < begun:
            *before, seen = self._in_flight.get(group, (0, 0, 0))
            seen = seen + 1 if before == [begun, finished] else 1
            self._in_flight[group] = (begun, finished, seen)
            if seen >= 4 and seen.bit_count() == 1 and is_done(finished + 1, begun):
                finished = begun
        self._finished[group] = finished
        return finished


class Collectives:
    """The groups of this process, by name.

    `watch` counts groups from now on: call it before the first one is made.
    """

    def __init__(self) -> None:
        self._made: dict[str, int] = dict.fromkeys(_READERS, 0)
        # (backend, number) -> group, its ranks. Held weakly: what holds a former group is given the one that is made
        # in its place, and the counts of the former one would be told of it.
        self._groups: dict[tuple[str, str], tuple[weakref.ref[Any], list[int]]] = {}
        self._readers: dict[str, Callable[..., bytes]] = {}
        self._finished = FinishedCounts()

    def watch(self) -> None:
        """Hear of every group that torch makes."""

        def make(original: Any) -> Any:
            def _new_process_group_helper(*args: Any, **kwargs: Any) -> Any:
                made = original(*args, **kwargs)
                self._add(made[0])
                return made

            return _new_process_group_helper

        target = "torch.distributed.distributed_c10d:_new_process_group_helper"
        patches.GROUP_NUMBERS.apply({target: make})

    def _add(self, group: Any) -> None:
        if group is None or group is c10d.GroupMember.NON_GROUP_MEMBER:
            return
        backends = str(c10d._world.pg_backend_config.get(group, ""))
        for backend in _READERS:
            if backend in backends:
                number = str(self._made[backend])
                self._made[backend] += 1
                self._groups[(backend, number)] = (weakref.ref(group), [])
                self._readers.setdefault(backend, getattr(recorder, _READERS[backend], _nothing))

    def state(self) -> dict[str, GroupRow]:
        """By name of a living group: its ranks, collectives begun, collectives finished."""
        found: dict[str, GroupRow] = {}
        for backend, read in list(self._readers.items()):
            status = msgspec.json.decode(read(includeCollectives=False)).get("pg_status", {})
            for number, row in status.items():
                refer, ranks = self._groups.get((backend, number), (_no_group, []))
                group = refer()
                if group is None or group not in c10d._world.pg_map:
                    continue  # of an earlier generation
                if not ranks:
                    ranks += dist.get_process_group_ranks(group)
                name = "world" if group is c10d.GroupMember.WORLD else group.group_name
                begun, told = (
                    max(int(row["last_enqueued_collective"]), 0),
                    max(int(row["last_completed_collective"]), 0),
                )
                is_done = functools.partial(_is_done, read, number)
                finished = self._finished.count((backend, number), begun, told, is_done)
                found[f"{name}/{backend}"] = [ranks, begun, finished]
        return found


def _is_done(read: Callable[..., bytes], number: str, first: int, last: int) -> bool:
    """Whether the recorder's own entries of these collectives of a group are there and closed."""
    entries = [
        entry
        for entry in json.loads(read(includeCollectives=True)).get("entries", ())
        if str(entry["pg_id"]) == number and not entry["is_p2p"] and first <= entry["collective_seq_id"] <= last
    ]
    return bool(entries) and all(entry["retired"] for entry in entries)


def as_sent(groups: dict[str, GroupRow]) -> dict[str, GroupRow]:
    """As a message has them: no ranks for all of the world, or each of a thousand ranks would name a thousand."""
    world = c10d.GroupMember.WORLD
    everyone = world.size() if world is not None else 0
    return {name: [[] if len(ranks) == everyone else ranks, *counts] for name, (ranks, *counts) in groups.items()}


def _no_group() -> None:
    return None


def _nothing(**_: Any) -> bytes:
    return b"{}"
