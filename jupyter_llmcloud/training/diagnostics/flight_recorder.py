"""Which collectives has this rank begun and finished? Read from torch's flight recorder, also for those made in C++.

Nothing is wrapped: what counts is what the backends record themselves, so that the gradient all_reduce of a backward
pass, which no Python function starts, is seen like any other. The recorder knows a group by a number that counts the
groups of this process; the same numbers are counted here, since only the group's name means the same on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d as recorder
from torch.distributed import distributed_c10d as c10d

from jupyter_llmcloud.training import patches

GroupRow = list[Any]  # [ranks, begun, finished]

_READERS: dict[str, str] = {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}


class Collectives:
    """The groups of this process, by name.

    `watch` counts groups from now on: call it before the first one is made.
    """

    def __init__(self) -> None:
        self._made: dict[str, int] = dict.fromkeys(_READERS, 0)
        self._groups: dict[tuple[str, str], tuple[Any, list[int]]] = {}  # (backend, number) -> group, its ranks
        self._readers: dict[str, Callable[..., bytes]] = {}

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
                self._groups[(backend, number)] = (group, [])
                self._readers.setdefault(backend, getattr(recorder, _READERS[backend], _nothing))

    def state(self) -> dict[str, GroupRow]:
        """By name of a living group: its ranks, collectives begun, collectives finished."""
        found: dict[str, GroupRow] = {}
        for backend, read in list(self._readers.items()):
            status = json.loads(read(includeCollectives=False)).get("pg_status", {})
            for number, row in status.items():
                group, ranks = self._groups.get((backend, number), (None, []))
                if group is None or group not in c10d._world.pg_map:
                    continue  # of an earlier generation
                if not ranks:
                    ranks += dist.get_process_group_ranks(group)
                name = "world" if group is c10d.GroupMember.WORLD else group.group_name
                begun, finished = int(row["last_enqueued_collective"]), int(row["last_completed_collective"])
                found[f"{name}/{backend}"] = [ranks, max(begun, 0), max(finished, 0)]
        return found


def as_sent(groups: dict[str, GroupRow]) -> dict[str, GroupRow]:
    """As a message has them: no ranks for all of the world, or each of a thousand ranks would name a thousand."""
    everyone = dist.get_world_size() if dist.is_initialized() else 0
    return {name: [[] if len(ranks) == everyone else ranks, *counts] for name, (ranks, *counts) in groups.items()}


def _nothing(**_: Any) -> bytes:
    return b"{}"
