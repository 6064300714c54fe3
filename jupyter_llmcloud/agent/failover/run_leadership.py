"""A run with restarts that is led from here: its term, and the agents that stand by to lead it when this one has gone.

Those that host ranks of the run stand by; a run whose ranks are all here asks its worker for another agent. Whoever
stands by leads only after a silence (see core.link), and only in a term that nobody has claimed. So this agent claims
the next term before it goes on without one of them, and ranks beside it end by themselves when it stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.agent.failover.follower_link import FollowerLink
from jupyter_llmcloud.core.scheduling.lease_link import TAKES_OVER
from jupyter_llmcloud.protocol.agent_messages import Execute, StartWorld
from jupyter_llmcloud.protocol.frames import replace
from jupyter_llmcloud.protocol.rank_messages import StandBy
from jupyter_llmcloud.storage.leadership import Claim, Leadership
from jupyter_llmcloud.storage.runs import RunFolder

if TYPE_CHECKING:
    from jupyter_llmcloud.agent.agent import Agent


class RunLeadership:
    """The leading agent's side.

    Args:
        term: that this agent has claimed, -1 before it has claimed any.
        on_change: called when `until` may have changed.
        on_loss: called when another agent leads the run.
    """

    def __init__(
        self,
        agent: Agent,
        spec: StartWorld,
        folder: RunFolder,
        *,
        on_change: Callable[[float | None], None],
        on_loss: Callable[[], None],
        term: int = -1,
    ) -> None:
        self._agent = agent
        self._spec = spec
        self._folder = folder
        self._leadership = Leadership(folder.path)
        self._on_change = on_change
        self._on_loss = on_loss
        self._term = term
        self._standing_by: list[FollowerLink] = []
        self._followers: list[FollowerLink] = []
        self._spare: FollowerLink | None = None
        self._claiming = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def begin(self, cell: Execute, definitions: list[Execute], num_threads: Mapping[int, int]) -> None:
        """Claim the first term and write down what another agent needs. Raises OSError."""
        spec = replace(self._spec, num_threads=dict(num_threads))
        await asyncio.to_thread(self._leadership.save, spec, cell, definitions)
        await self.claim()

    async def claim(self) -> bool:
        """Lead in the next term, in which nobody stands by yet; False when another agent does. Raises OSError."""
        async with self._claiming:
            claim = Claim(self._term + 1, self._agent.address, socket.gethostname())
            return self._claimed(claim, await asyncio.to_thread(self._leadership.claim, claim))

    def _claimed(self, claim: Claim, is_ours: bool) -> bool:
        if is_ours:
            self._term = claim.term
            self._standing_by = []
            self._on_change(self.until)
        return is_ours

    def leads(self, to_the_end: bool = False) -> bool:
        """Whether this agent leads the run now, as far as is known.

        When another one could by now, the run's folder is looked at; its end is not told (`to_the_end`) without a claim
        to the next term.
        """
        until = self.until
        if until is None or asyncio.get_running_loop().time() < until:
            return True
        try:
            if not to_the_end:
                return not self.is_over
            claim = Claim(self._term + 1, self._agent.address, socket.gethostname())
            return self._claimed(claim, self._leadership.claim(claim))
        except OSError:
            return False

    @property
    def is_over(self) -> bool:
        """Whether another agent has claimed to lead the run."""
        return self._leadership.is_claimed(self._term + 1)

    def stand_by(self, followers: Sequence[FollowerLink]) -> None:
        """Have the agents that host ranks stand by, or another one when there are none."""
        self._followers = [follower for follower in followers if not follower.gone]
        elsewhere = any(not follower.is_here for follower in self._followers)
        wait_s = TAKES_OVER * self._spec.link_lease_s if elsewhere else 0.0
        self._agent.takeovers.leads(self._folder.path, wait_s)
        told = StandBy(folder=str(self._folder.path), term=self._term, wait_s=wait_s)
        self._drop_spare()
        for follower in self._followers:
            follower.say(told)
        self._standing_by = list(self._followers)
        self._on_change(self.until)
        if not self._followers:
            self._do(self._find_spare(told))

    async def _find_spare(self, told: StandBy) -> None:
        address = await self._agent.cluster.find_stand_by()
        if not address or self._spare is not None or told.term != self._term:
            return
        name = f"{self._spec.world_id}~{self._term}"
        self._spare = FollowerLink(
            address, name, self._spec.link_lease_s, lambda _: None, lambda _: self._do(self._spare_lost()), hosts=False
        )
        self._standing_by.append(self._spare)
        self._spare.begin()
        self._spare.say(told)
        self._on_change(self.until)

    async def _spare_lost(self) -> None:
        try:
            claimed = await self.claim()
        except OSError:
            claimed = False  # who cannot see the folder cannot know that it still leads
        if claimed:
            self._spare = None
            self.stand_by(self._followers)
        else:
            self._on_loss()

    def _drop_spare(self) -> None:
        if self._spare is not None:
            spare, self._spare = self._spare, None
            spare.close()

    def _do(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def until(self) -> float | None:
        """Until when no other agent leads the run, whatever becomes of this one; None when nobody stands by."""
        return min((link.leads_until for link in self._standing_by), default=None)

    def end(self) -> None:
        """The run has ended, or is led from elsewhere."""
        for task in self._tasks:
            task.cancel()
        self._agent.takeovers.leads_no_more(self._folder.path)
        for follower in self._followers:
            follower.say(StandBy(folder=""))
        self._drop_spare()
        self._standing_by = []
        self._on_change(None)

    def leave(self) -> None:
        """This agent is told to end: others find everything as if it had been killed."""
        for task in self._tasks:
            task.cancel()
        if self._spare is not None:
            self._spare.leave()

    def forget(self) -> None:
        """The run has ended: nobody may lead it any more."""
        with contextlib.suppress(OSError):
            self._leadership.forget()
