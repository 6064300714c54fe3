"""Requests to single ranks of a world and their replies, and looks at ranks that are silent."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.agent.ranks.local_rank import RankLink
from jupyter_llmcloud.errors import LLMCloudError, WorldError
from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rank_messages import DumpRankStacks, ListRankVariables, RankProbed
from jupyter_llmcloud.protocol.rpc import Calls, R, Reply, Request

STACKS_TIMEOUT_S = 2.0


class RankCalls:
    """What ranks were asked and have not answered yet.

    Args:
        links: how to reach each rank.
    """

    def __init__(self, links: Mapping[int, RankLink]) -> None:
        self._links = links
        self._calls: defaultdict[int, Calls] = defaultdict(lambda: Calls("a rank"))  # by rank
        self._looks: dict[int, asyncio.Future[RankProbed]] = {}

    async def ask(self, rank: int, request: Request[R]) -> R:
        """Send a request to a rank and wait for its reply; raises what it refuses with."""
        return await self._calls[rank].ask(request, self._links[rank].send)

    def hear(self, rank: int, message: Message) -> bool:
        """A rank says something; returns whether it was the reply to a request."""
        if isinstance(message, Reply) and message.reply_to:
            self._calls[rank].take(message)
            return True
        if isinstance(message, RankProbed) and message.dumped and (looked := self._looks.pop(rank, None)):
            looked.set_result(message)
        return False

    def expect_nothing(self, rank: int, reason: str) -> None:
        """The rank will answer no more: whoever waits for it is told why."""
        if (calls := self._calls.pop(rank, None)) is not None:  # one that takes its place is asked anew
            calls.fail(WorldError(f"rank {rank}: {reason}"))

    async def stack_of(self, rank: int) -> dict[str, Any]:
        """What every thread of a rank is doing now; a silent one is looked at from outside."""
        try:
            async with asyncio.timeout(STACKS_TIMEOUT_S):
                return (await self.ask(rank, DumpRankStacks())).as_dict()
        except LLMCloudError:
            return {"state": ""}
        except TimeoutError:
            return await self._look_at(rank)

    async def variables_of(self, rank: int) -> dict[str, Any]:
        """The user's variables of a rank, or why they are not told."""
        try:
            async with asyncio.timeout(STACKS_TIMEOUT_S):
                return (await self.ask(rank, ListRankVariables())).as_dict()
        except LLMCloudError as error:
            return {"problem": str(error)}
        except TimeoutError:
            return {"problem": "it does not answer while it computes: try again."}

    async def _look_at(self, rank: int) -> dict[str, Any]:
        looked = self._looks[rank] = self._looks.get(rank) or asyncio.get_running_loop().create_future()
        self._links[rank].look(dump=True)
        try:
            async with asyncio.timeout(STACKS_TIMEOUT_S):
                look = await asyncio.shield(looked)
        except TimeoutError:
            return {"state": ""}
        return {"state": look.state, "busy": look.busy, "dump": look.dump}
