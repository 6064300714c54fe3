"""A run with restarts that is led from here: its term, and the agents that stand by to lead it when this one has gone.

Those that host ranks of the run stand by; a run whose ranks are all here asks its worker for another agent. Whoever
stands by leads only after a silence (see core.scheduling.lease_link), and only in a term that nobody has claimed. When
this agent claims the next term is decided in core.run.run_machine; ranks beside it end by themselves when it stands
still.

The file of a term names those who go on standing by in it, so there is no moment at which nobody would follow. Others
are told of the term, after its claim. Who is named or told counts (`until`) up to a claim that does not name it any
more, also when it is not needed or not heard any more: that it was told so does not mean that it has heard it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from jupyter_llmcloud.agent.failover.follower_link import FollowerLink
from jupyter_llmcloud.agent.node_services import NodeServices
from jupyter_llmcloud.core.scheduling.lease_link import TAKES_OVER
from jupyter_llmcloud.protocol.agent_messages import Execute, Replayed, StartWorld
from jupyter_llmcloud.protocol.connection import AGENT_SOCKET
from jupyter_llmcloud.protocol.frames import Message, replace
from jupyter_llmcloud.protocol.rank_messages import AgentLeaves, StandBy
from jupyter_llmcloud.storage.leadership import Leadership, TermClaim


class RunLeadership:
    """The leading agent's side.

    Args:
        folder: of the run.
        on_change: called when `until` may have changed.
        on_standby_lost: called when the agent that only stands by is not heard any more.
        term: that this agent has claimed, -1 before it has claimed any.
    """

    def __init__(
        self,
        node: NodeServices,
        spec: StartWorld,
        folder: Path,
        *,
        on_change: Callable[[float | None], None],
        on_standby_lost: Callable[[], None],
        term: int = -1,
    ) -> None:
        self._node = node
        self._spec = spec
        self._folder = folder
        self._leadership = Leadership(folder)
        self._on_change = on_change
        self._on_standby_lost = on_standby_lost
        self._term = term
        self._claiming = asyncio.Lock()
        self._standing_by: dict[FollowerLink, str] = {}  # and what they are called
        self._followers: list[FollowerLink] = []
        self._spare: FollowerLink | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def begin(self, cell: Execute, definitions: list[Replayed], num_threads: Mapping[int, int]) -> None:
        """Claim the first term and write down what another agent needs. Raises OSError."""
        spec = replace(self._spec, num_threads=dict(num_threads))
        await asyncio.to_thread(self._leadership.save, spec, cell, definitions)
        await self.claim()

    async def claim(self) -> bool:
        """Lead in the next term, in which those that are there stand by; False when another does. Raises OSError."""
        async with self._claiming:
            claim = self._next_claim()
            return self._claimed(claim, await asyncio.to_thread(self._leadership.claim, claim))

    def claim_now(self) -> bool:
        """As `claim`, before anything else happens."""
        claim = self._next_claim()
        return self._claimed(claim, self._leadership.claim(claim))

    def _next_claim(self) -> TermClaim:
        heirs = tuple(name for link, name in self._standing_by.items() if link in self._present)
        return TermClaim(self._term + 1, self._node.address, socket.gethostname(), heirs)

    def note_here(self) -> None:
        """An agent that takes this one's place here is to lead the run, also when nobody stands by yet."""
        homes = [allocation.get("home", allocation["address"]) for allocation in self._spec.agents]
        self._node.leads(self._folder, self._wait_s(any(Path(home).name != AGENT_SOCKET for home in homes)))

    def _wait_s(self, elsewhere: bool) -> float:
        """How long ranks may live on when this agent has gone."""
        return TAKES_OVER * self._spec.link_lease_s if elsewhere else 0.0

    def _claimed(self, claim: TermClaim, is_ours: bool) -> bool:
        if is_ours:
            self._term = claim.term
            self._standing_by = {link: name for link, name in self._standing_by.items() if name in claim.heirs}
            self._on_change(self.until)
        return is_ours

    async def settled(self) -> None:
        """Wait for the claim that is under way, if one is."""
        async with self._claiming:
            pass

    @property
    def is_lost(self) -> bool:
        """Whether another agent leads the run now, as far as is known: the folder is looked at only when one could."""
        until = self.until
        if until is None or asyncio.get_running_loop().time() < until:
            return False
        try:
            return self.is_over
        except OSError:
            return True

    @property
    def was_left(self) -> bool:
        """Whether the leader before this one has gone on purpose."""
        return self._leadership.was_left(self._term - 1)

    @property
    def is_over(self) -> bool:
        """Whether another agent has claimed to lead the run."""
        return self._leadership.is_claimed(self._term + 1)

    def standby(self, followers: Sequence[FollowerLink]) -> None:
        """Have the agents that host ranks stand by, or another one when there are none."""
        self._followers = [follower for follower in followers if not follower.gone]
        elsewhere = any(not follower.is_here for follower in self._followers)
        told = StandBy(folder=str(self._folder), term=self._term, wait_s=self._wait_s(elsewhere))
        self._node.leads(self._folder, told.wait_s)
        if self._spare is not None and (self._followers or self._spare.gone):
            self._drop_spare()
        for link in self._present:
            self._appoint(link, told)
        self._on_change(self.until)
        if len(self._standing_by) > len(self._present):
            self._on_standby_lost()  # it may lead up to a term that does not name it any more
        elif not self._standing_by:
            self._do(self._find_spare(told))

    def _appoint(self, link: FollowerLink, told: StandBy) -> None:
        name = self._standing_by.setdefault(link, uuid.uuid4().hex)
        link.send(replace(told, heir=name))

    async def _find_spare(self, told: StandBy) -> None:
        address = await self._node.find_standby()
        if not address or self._standing_by or self._spare is not None or told.term != self._term:
            return
        name = f"{self._spec.world_id}~{self._term}"
        self._spare = FollowerLink(
            address, name, self._spec.link_lease_s, self._spare_says, lambda _: self._on_standby_lost(), hosts=False
        )
        self._spare.begin()
        self._appoint(self._spare, told)
        self._on_change(self.until)

    def _spare_says(self, message: Message) -> None:
        if isinstance(message, AgentLeaves):  # with its host: another one is to stand by
            self._drop_spare()
            self._on_standby_lost()

    @property
    def _present(self) -> list[FollowerLink]:
        """Those that are to stand by, as far as they are there."""
        asked = [*self._followers, *([self._spare] if self._spare is not None else [])]
        return [link for link in asked if not link.gone]

    def _drop_spare(self) -> None:
        if self._spare is not None:
            spare, self._spare = self._spare, None
            spare.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
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
        self._node.leads_no_more(self._folder)
        for follower in self._followers:
            follower.send(StandBy(folder=""))
        self._drop_spare()
        self._standing_by = {}
        self._on_change(None)

    def announce_end(self) -> None:
        """The host will be taken away: whoever leads after this agent knows that nothing is wrong with the run."""
        self._leadership.say_left(self._term)

    def leave(self) -> None:
        """This agent is told to end: others find everything as if it had been killed, and that it was announced."""
        self.announce_end()
        for task in self._tasks:
            task.cancel()
        if self._spare is not None:
            self._spare.leave()

    def forget(self) -> None:
        """The run has ended: nobody may lead it any more."""
        with contextlib.suppress(OSError):
            self._leadership.forget()
