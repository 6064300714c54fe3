"""The moment in which all ranks of a world join one generation of its process group."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

from jupyter_llmcloud.errors import WorldError
from jupyter_llmcloud.protocol.rank_messages import Joined

JOIN_TIMEOUT_S = 120.0
RELEASE_TIMEOUT_S = 5.0
_ENDED = "its process has ended already."


class Rendezvous:
    """The forming of a process group by all ranks of a world; one at a time."""

    def __init__(self) -> None:
        self._joining: dict[int, asyncio.Future[Joined]] = {}

    async def join(
        self, ranks: Collection[int], dead: Collection[int], tell: Callable[[], None], release: Callable[[], None]
    ) -> None:
        """Have ranks join by `tell`; when one cannot, `release` those that wait for it. Raises WorldError."""
        loop = asyncio.get_running_loop()
        self._joining = {rank: loop.create_future() for rank in ranks}
        for rank in dead:
            self.cannot_join(rank, _ENDED)
        tell()
        first = await self._first_that_cannot_join(JOIN_TIMEOUT_S)
        if first:
            release()  # who waits for it would wait in vain
            await self._first_that_cannot_join(RELEASE_TIMEOUT_S, wait_for_all=True)
            raise WorldError(first)
        late = [rank for rank, future in self._joining.items() if not future.done()]
        if late:
            raise WorldError(f"ranks {late} did not join the process group in {JOIN_TIMEOUT_S:g} s.")

    def hear(self, rank: int, joined: Joined) -> None:
        """A rank has joined, or could not."""
        waiting = self._joining.get(rank)
        if waiting is not None and not waiting.done():
            waiting.set_result(joined)

    def cannot_join(self, rank: int, reason: str) -> None:
        """The process of a rank has gone."""
        self.hear(rank, Joined(generation=-1, error=reason))

    async def _first_that_cannot_join(self, timeout_s: float, wait_for_all: bool = False) -> str:
        """Wait until all ranks have joined or one cannot; says which and why."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            answers = {rank: future.result() for rank, future in self._joining.items() if future.done()}
            waiting = [future for future in self._joining.values() if not future.done()]
            for rank, answer in answers.items():
                if answer.error and not (wait_for_all and waiting):
                    return f"rank {rank} could not join the process group: {answer.error}"
            if not waiting:
                return ""
            await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        return ""
