"""What a world's ranks were given to begin with: definition cells, and variables that were pushed to all of them.

Both are had again by ranks that are new processes, in their order, as long as the world lives.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from typing import Protocol

from jupyter_llmcloud.core.names import format_ranks
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.agent_messages import Execute, Names, Pull, Push, Replayed
from jupyter_llmcloud.protocol.frames import replace
from jupyter_llmcloud.protocol.rpc import R, Request

REPLAY_TIMEOUT_S = 120.0
MAX_NAMED = 8
MAX_PUSHED = 64 << 20  # bytes of pushed variables that are kept; of more the oldest are not


class SendRequest(Protocol):
    """Sends a rank a request and waits for its reply; raises what it is refused with."""

    async def __call__(self, rank: int, request: Request[R]) -> R: ...


class ReplayCells:
    """In the order in which they were executed.

    Args:
        world_id: of the world.
        ask: sends a rank a request and waits for its answer.
    """

    def __init__(self, world_id: str, ask: SendRequest) -> None:
        self.cells: list[Replayed] = []
        self._world_id = world_id
        self._ask = ask
        self._missing: dict[int, set[str]] = {}  # what ranks lacked after they were replaced
        self._made: dict[str, int] = {}  # execution counts of the cells that bound variables last

    def note(self, cell: Execute) -> None:
        """A cell was executed on all ranks."""
        self._made |= dict.fromkeys(cell.makes or (), cell.execution_count)
        if cell.is_definition:
            self.cells.append(cell)
        elif cell.definitions and not self._is_last(cell.definitions):
            self.cells.append(replace(cell, code=cell.definitions, definitions="", payload=b""))

    def _is_last(self, code: str) -> bool:
        """Whether a cell of this code came last, as one that is executed again and again."""
        last = self.cells[-1] if self.cells else None
        return isinstance(last, Execute) and last.code == code

    def note_push(self, pushed: Push) -> None:
        """Variables were set on all ranks; what was pushed under the same names before is of no use."""
        if len(pushed.payload) > MAX_PUSHED:
            return
        names = set(pushed.texts)
        kept = [cell for cell in self.cells if not (isinstance(cell, Push) and names and set(cell.texts) <= names)]
        self.cells = [*kept, replace(pushed, ranks=[], number=0)]
        size = 0
        for cell in reversed(self.cells):
            size += len(cell.payload) if isinstance(cell, Push) else 0
            if isinstance(cell, Push) and size > MAX_PUSHED:
                self.cells.remove(cell)

    async def restore(
        self, replaced: Sequence[int], ranks: Collection[int], coming: Execute | None = None
    ) -> tuple[list[str], list[int]]:
        """Run them on the ranks that were replaced, of all `ranks`; says what could not be restored.

        What the cell that is `coming` makes again is not missed. Returns as well the ranks on which a cell did not end
        within its time: alone it waits for others.
        """
        survivors = [rank for rank in ranks if rank not in replaced]
        stuck = [rank for rank in replaced if not await self._replay(rank)]
        if replaced and not survivors:
            gone = " What other cells had made is gone: no rank is left that has it."
            return [f"{self._again(replaced)}{'' if coming is not None and coming.script else gone}"], stuck
        alike: dict[tuple[str, ...], list[int]] = {}
        for rank in replaced:
            missing = [] if rank in stuck else await self._compare(rank, survivors[0])
            alike.setdefault(tuple(name for name in missing if not _makes(coming, name)), []).append(rank)
        return [f"{self._again(who)}{self._lacking(names, who, stuck, coming)}" for names, who in alike.items()], stuck

    async def _replay(self, rank: int) -> bool:
        """False when a cell did not end."""
        try:
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                for cell in self.cells:
                    if isinstance(cell, Push):
                        with contextlib.suppress(UsageError):  # what cannot be loaded there is named as missing
                            await self._ask(rank, replace(cell, ranks=[rank]))
                    else:
                        await self._ask(rank, replace(cell, ranks=[rank], save=[], pull=[]))
        except TimeoutError:
            return False
        return True

    def _again(self, ranks: Sequence[int]) -> str:
        numbers = format_ranks(list(ranks))
        one = len(ranks) == 1
        who = f"rank {numbers} is a new process" if one else f"ranks {numbers} are new processes"
        num_pushes = sum(isinstance(cell, Push) for cell in self.cells)
        pushed = ", and what was pushed is there" if num_pushes else ""
        num_cells = len(self.cells) - num_pushes
        return f"{who}; {num_cells} definition cells were run on {'it' if one else 'them'} again{pushed}."

    def _lacking(self, names: Sequence[str], ranks: Sequence[int], stuck: Sequence[int], coming: Execute | None) -> str:
        if set(ranks) & set(stuck):
            return f" One of them did not end there in {REPLAY_TIMEOUT_S:g} s: alone it waits for other ranks."
        if not names:
            return " Nothing is missing." if coming is None else ""
        more = len(names) - MAX_NAMED
        listed = ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
        makers = sorted({self._made[name] for name in names if name in self._made})
        cells = f" Made by In [{'], In ['.join(map(str, makers))}]." if makers else ""
        return f" Not restored: {len(names)} variable{'' if len(names) == 1 else 's'} ({listed}).{cells}"

    async def _compare(self, rank: int, survivor: int) -> list[str]:
        """What a rank lacks that another has: modules are imported, the rest is named."""
        known = await self._ask(survivor, Names(world_id=self._world_id, names=[]))
        names = {*known.own, *self._missing.get(survivor, ())}
        asked = Names(world_id=self._world_id, names=sorted(names))
        missing = (await self._ask(rank, asked)).missing
        if imported := [name for name in missing if name in known.imported]:
            await self._import(rank, survivor, imported)
            missing = (await self._ask(rank, asked)).missing
        self._missing[rank] = set(missing)
        return missing

    async def _import(self, rank: int, survivor: int, names: list[str]) -> None:
        """Have what another rank has imported, in whatever cell; pickled it is a reference."""
        with contextlib.suppress(UsageError):  # what cannot be pickled or loaded is named as missing
            pulled = await self._ask(survivor, Pull(world_id=self._world_id, names=names))
            await self._ask(rank, Push(world_id=self._world_id, payload=pulled.payload))


def _makes(cell: Execute | None, name: str) -> bool:
    """Whether a cell makes this variable, so that nobody misses it before."""
    return cell is not None and (bool(cell.script) or name in (cell.makes or ()))
