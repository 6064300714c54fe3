"""The definition cells of a world: run again on ranks that are new processes, as long as the world lives."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Protocol

from jupyter_llmcloud.core.names import format_ranks
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.agent_messages import Execute, Names, Pull, Push
from jupyter_llmcloud.protocol.frames import replace
from jupyter_llmcloud.protocol.rpc import R, Request


class Ask(Protocol):
    """Sends a rank a request and waits for its reply; raises what it is refused with."""

    async def __call__(self, rank: int, request: Request[R]) -> R: ...


class ReplayCells:
    """In the order in which they were executed.

    Args:
        world_id: of the world.
        ask: sends a rank a request and waits for its answer.
    """

    def __init__(self, world_id: str, ask: Ask) -> None:
        self.cells: list[Execute] = []
        self._world_id = world_id
        self._ask = ask
        self._missing: dict[int, set[str]] = {}  # what ranks lacked after they were replaced

    async def restore(self, replaced: Sequence[int], ranks: Collection[int]) -> list[str]:
        """Run them on the ranks that were replaced, of all `ranks`; says what could not be restored."""
        survivors = [rank for rank in ranks if rank not in replaced]
        notes = []
        for rank in replaced:
            for cell in self.cells:
                await self._ask(rank, replace(cell, ranks=[rank], save=[], pull=[]))
            if survivors:
                notes.append(f"rank {rank} is {self._new(1)}{await self._compare(rank, survivors[0])}")
        if replaced and not survivors:
            one = len(replaced) == 1
            who = f"rank{'' if one else 's'} {format_ranks(list(replaced))} {'is' if one else 'are'}"
            gone = " What other cells had made is gone: no rank is left that has it."
            notes.append(f"{who} {self._new(len(replaced))}{gone}")
        return notes

    def _new(self, number: int) -> str:
        what, whom = ("a new process", "it") if number == 1 else ("new processes", "them")
        return f"{what}; {len(self.cells)} definition cells were run on {whom} again."

    async def _compare(self, rank: int, survivor: int) -> str:
        """What a rank lacks that another has: modules are imported, the rest is named."""
        known = await self._ask(survivor, Names(world_id=self._world_id, names=[]))
        names = {*known.own, *self._missing.get(survivor, ())}
        asked = Names(world_id=self._world_id, names=sorted(names))
        missing = (await self._ask(rank, asked)).missing
        if imported := [name for name in missing if name in known.imported]:
            await self._import(rank, survivor, imported)
            missing = (await self._ask(rank, asked)).missing
        self._missing[rank] = set(missing)
        return f" Not restored: {', '.join(missing)}." if missing else " Nothing is missing."

    async def _import(self, rank: int, survivor: int, names: list[str]) -> None:
        """Have what another rank has imported, in whatever cell; pickled it is a reference."""
        with contextlib.suppress(UsageError):  # what cannot be pickled or loaded is named as missing
            pulled = await self._ask(survivor, Pull(world_id=self._world_id, names=names))
            await self._ask(rank, Push(world_id=self._world_id, payload=pulled.payload))
