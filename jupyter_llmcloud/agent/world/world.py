"""A world on its leading agent: a set of ranks with one process group. What is executed on them it does not know."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from jupyter_llmcloud.agent.failover.follower_link import FollowerLink
from jupyter_llmcloud.agent.node_services import NodeServices
from jupyter_llmcloud.agent.ranks.local_group import RankEvents
from jupyter_llmcloud.agent.ranks.local_rank import RankLink
from jupyter_llmcloud.agent.ranks.rank_groups import RankGroups
from jupyter_llmcloud.agent.world.rank_calls import RankCalls
from jupyter_llmcloud.agent.world.rendezvous import Rendezvous
from jupyter_llmcloud.agent.world.replay_cells import ReplayCells
from jupyter_llmcloud.core.run import membership
from jupyter_llmcloud.core.run.exits import describe_exit, has_dumped
from jupyter_llmcloud.core.run.membership import Membership, MembershipStep
from jupyter_llmcloud.core.run.stacks import crash_place
from jupyter_llmcloud.core.scheduling.elasticity import SizeBounds
from jupyter_llmcloud.errors import Busy, UsageError, WorldError
from jupyter_llmcloud.protocol.agent_messages import (
    Execute,
    Push,
    Replayed,
    StartWorld,
    WorldStacks,
    WorldVariables,
)
from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rank_messages import Interrupt, Joined, LogRecords, Release
from jupyter_llmcloud.protocol.rpc import R, Request

Slots = Sequence[dict[str, Any]]
MAX_LAST_OUTPUT = 16_000  # characters: a crash prints the stacks of all threads
MAX_LAST_WORDS = 2000


class RankListener(Protocol):
    """Who executes something on the ranks."""

    @property
    def is_busy(self) -> bool:
        """Whether something is executed now."""

    def on_message(self, rank: int, message: Message) -> None:
        """A rank says something."""

    def on_death(self, rank: int, name: str, reason: str) -> None:
        """The process of a rank has gone; `name` is of the error that this is to a run."""


class World:
    """Started by `start`.

    Args:
        listener: is told what ranks say and when they die.

    Attributes:
        notes: what became of ranks that were replaced, to be told with the next run.
        cells: execution counts by the files of notebook cells.
        phases: (when, which) of the start of its ranks, until its first run has them.
    """

    def __init__(self, node: NodeServices, spec: StartWorld, listener: RankListener) -> None:
        self.spec = spec
        self.members = Membership(sum(allocation["num_ranks"] for allocation in spec.agents))
        self.groups = RankGroups(node, spec, RankEvents(self._on_message, self._on_exit))
        self.notes: list[str] = []
        self.cells: dict[str, int] = {}
        self.phases: list[tuple[float, str]] = []
        self.closed = False
        self._listener = listener
        self._calls = RankCalls(self.groups.links)
        self.definitions = ReplayCells(spec.world_id, self._calls.ask)
        self._rendezvous = Rendezvous()
        self._last_output: dict[int, str] = {}

    @property
    def links(self) -> dict[int, RankLink]:
        """How to reach each rank."""
        return self.groups.links

    @property
    def world_id(self) -> str:
        """Its name."""
        return self.spec.world_id

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.members.size

    @property
    def dead(self) -> list[int]:
        """Ranks whose process has gone."""
        return sorted(self.members.dead)

    @property
    def generation(self) -> int:
        """Of the process group."""
        return self.members.generation

    @property
    def followers(self) -> list[FollowerLink]:
        """The links to the other agents that host ranks."""
        return self.groups.followers

    @property
    def num_threads(self) -> Mapping[int, int]:
        """Of each rank."""
        return self.groups.num_threads

    @property
    def cwd(self) -> str:
        """Where its ranks work."""
        return self.spec.cwd

    @property
    def ranks_of_hosts(self) -> list[int]:
        """How many ranks each of its hosts has."""
        return [allocation["num_ranks"] for allocation in self.spec.agents]

    @property
    def replay_cells(self) -> list[Replayed]:
        """The definition cells that were executed and what was pushed, in their order."""
        return self.definitions.cells

    def remember(self, cell: Execute) -> None:
        """A cell was executed on all ranks: one of definitions is run again on ranks that are new processes."""
        self.definitions.note(cell)

    def remember_push(self, pushed: Push) -> None:
        """Variables were set on all ranks: they are set again on ranks that are new processes."""
        self.definitions.note_push(pushed)

    def inherit(self, num_ranks: int, definitions: list[Replayed], agents_left_out: Iterable[str] = ()) -> None:
        """Be like the world that a run had under a leader that has gone."""
        self.members.size = num_ranks
        self.definitions.cells = definitions
        self.groups.keep_out(agents_left_out)

    def live_until(self, until: float | None) -> None:
        """The ranks of this agent end at this time of its clock (None: they do not), unless they are told another."""
        self.groups.live_until(until)

    def take_notes(self) -> list[str]:
        """What became of ranks, once."""
        notes, self.notes = self.notes, []
        return notes

    def take_phases(self) -> list[tuple[float, str]]:
        """How its ranks were started, once."""
        phases, self.phases = self.phases, []
        return phases

    def needs_renewal(self, must_renew: bool) -> None:
        """A run has ended; whether it left the process group in a state that cannot be used."""
        self.members.must_renew |= must_renew

    # --- start and end ---

    async def start(self) -> None:
        """Fork the ranks on every agent and join them to one process group."""
        self.phases = [(time.time(), "starting ranks")]
        try:
            await self._carry_out(self.members.start(), self.spec.agents)
        except BaseException:
            self.close("the world was stopped.")
            raise

    def leave(self) -> None:
        """Another agent goes on with what is executed here: the ranks end, those elsewhere when they notice."""
        self.closed = True
        self.groups.leave()

    def give_up(self, rank: int, reason: str) -> None:
        """The agent elsewhere that hosts this rank is about to end: its ranks are lost from now on."""
        self.groups.give_up(rank, reason)

    def close(self, reason: str) -> None:
        """End every rank."""
        self.closed = True
        self.groups.close()
        for rank in self.members.ranks:
            self._expect_nothing(rank, reason)

    def _check_open(self) -> None:
        if self.closed:
            raise WorldError("the world has been stopped.")

    # --- its members ---

    @property
    def is_reshaped(self) -> bool:
        """Whether an elastic run has changed how many ranks there are."""
        return self.members.is_reshaped

    @property
    def has_lost_members(self) -> bool:
        """Whether ranks have gone with their agent."""
        return bool(self.members.is_started and self.groups.displaced(self.members.ranks))

    @property
    def was_announced(self) -> bool:
        """Whether those that have gone were taken away with their host, as it was announced."""
        return self.groups.was_announced(self.members.ranks)

    def without_host_of(self, rank: int) -> int:
        """How many ranks there are beside those of the agent that hosts this one."""
        return self.size - len(self.groups.beside(rank))

    def leave_out(self, rank: int) -> str:
        """Go on without the agent that hosts this rank from the next renewal on: it gets none again. Its key."""
        agent = self.groups.agent_of(rank) if self.members.is_started else ""
        if agent:
            self.groups.leave_out(agent)
        return agent

    async def find_capacity(self, bounds: SizeBounds | None = None) -> list[dict[str, Any]]:
        """Slots for the ranks whose agent has gone; within bounds, as many as there are. Raises Busy for too few."""
        lost = self.groups.displaced(self.members.ranks) if self.members.is_started else self.members.ranks
        if bounds is None:
            return await self.groups.find_capacity(len(lost)) if lost else []
        asked = bounds.to_ask(self.size - len(lost))
        if asked.most:
            with contextlib.suppress(Busy):
                # It goes on with what there is, and grows later: an agent that comes up takes seconds.
                return await self.groups.find_capacity(asked.most, at_once=True, at_least=max(1, asked.least))
        if not asked.least:
            return []
        beside = self.groups.left_out_in_words
        raise Busy(
            f"--elastic {bounds.least}:{bounds.most} needs {bounds.least} ranks, and there is no room for them{beside}."
        )

    async def heal(self, slots: Slots = (), coming: Execute | None = None, bounds: SizeBounds | None = None) -> None:
        """Replace ranks that have died, and renew the group when it cannot be used; `slots` were found for them.

        What the cell that is `coming` makes is not missed. Within `bounds` it goes on without the ranks whose agent
        has gone, and with as many more as there are slots.
        """
        self._check_open()
        try:
            steps = self._reshape(slots, bounds) if bounds is not None else self.members.repair(self.groups.has_store)
            await self._carry_out(steps, slots, coming)
        except BaseException:
            if not self.members.is_started:
                self.groups.reset()
                self.members.start_anew()
            raise

    def _reshape(self, slots: Slots, bounds: SizeBounds) -> list[MembershipStep]:
        was_started = self.members.is_started
        lost = self.groups.displaced(self.members.ranks) if was_started else self.members.ranks
        num_added = sum(slot["num_ranks"] for slot in slots)
        if self.size - len(lost) + num_added < bounds.least:  # more were lost since these slots were found
            raise Busy(f"{bounds.least} ranks are needed at the least.")
        steps = self.members.reshape(lost, num_added, self.groups.has_store)
        if was_started and not self.members.is_started:
            self.groups.reset()
        return steps

    async def resize(self, num_ranks: int, slots: Slots) -> None:
        """Have `num_ranks` ranks: the highest end, or more are started. The others keep their variables."""
        await self.heal()
        if (num_added := num_ranks - self.members.size) > 0:
            slots = await self.groups.find_capacity(num_added, given=slots)
        await self._carry_out(self.members.resize(num_ranks), slots)

    async def _carry_out(self, steps: Sequence[MembershipStep], slots: Slots, coming: Execute | None = None) -> None:
        for step in steps:
            match step:
                case membership.Renumber(numbers):
                    self.members.renumbered(numbers)
                    self.groups.renumber(numbers)
                case membership.ForkRanks():
                    await self._start_ranks(step.ranks, slots)
                case membership.Replace():
                    await self._replace(step.ranks, slots)
                case membership.Drop():
                    self.members.size = step.num_ranks
                    self.groups.drop(step.num_ranks)
                case membership.JoinGroup():
                    await self._join(step.generation)
                case membership.Restore():
                    await self._restore(step.ranks, coming)

    async def _restore(self, ranks: Sequence[int], coming: Execute | None) -> None:
        notes, stuck = await self.definitions.restore(ranks, self.links, coming)
        self.notes += notes
        for rank in stuck:
            for message in (Interrupt(), Release()):
                self.links[rank].send(message)
        self.members.must_renew |= bool(stuck)

    async def _start_ranks(self, ranks: Sequence[int], slots: Slots) -> None:
        before = ranks[0]
        self.members.size = before + len(ranks)
        try:
            await self.groups.start(slots or await self.groups.find_capacity(len(ranks)), self.members.size)
            if len(self.links) < self.members.size:
                raise Busy(f"{len(ranks)} ranks were asked for, and there are slots for fewer of them.")
        except BaseException:
            if self.members.is_started:
                self.members.size = before
                self.groups.drop(before)
            raise

    async def _replace(self, ranks: Sequence[int], slots: Slots) -> None:
        self.members.replacing(ranks)
        try:
            self.notes += await self.groups.replace(list(ranks), self.members.size, slots)
        except BaseException as error:
            self.members.not_replaced(ranks)
            if isinstance(error, Exception):
                self._check_open()
            raise

    async def _join(self, generation: int) -> None:
        self._check_open()
        if len(self.phases) == 1:
            self.phases.append((time.time(), "joining"))
        self.members.joining(generation)

        def release() -> None:
            for link in self.links.values():
                link.send(Release(generation=generation))

        await self._rendezvous.join(
            self.members.ranks,
            self.members.dead,
            lambda: self.groups.join(generation, self.members.size),
            release,
        )
        self.members.joined()

    # --- requests to single ranks ---

    async def ask(self, rank: int, request: Request[R]) -> R:
        """Send a request to a rank and wait for its reply; raises what it refuses with."""
        if rank not in self.links:
            raise UsageError(f"there is no rank {rank}: the world has ranks 0-{self.members.size - 1}.")
        await self.heal()
        return await self._calls.ask(rank, request)

    async def stacks(self) -> WorldStacks:
        """What every thread of every rank is doing now, also while a run goes on; silent ranks are looked at."""
        ranks = sorted(self.links)
        rows = await asyncio.gather(*map(self._stack_of, ranks))
        return WorldStacks(ranks=dict(zip(ranks, rows, strict=True)), cells=self.cells)

    async def variables(self) -> WorldVariables:
        """The user's variables of every rank, also while a run goes on."""
        ranks = sorted(set(self.links) - set(self.members.dead))
        rows = await asyncio.gather(*map(self._calls.variables_of, ranks))
        return WorldVariables(ranks=dict(zip(ranks, rows, strict=True)))

    async def _stack_of(self, rank: int) -> dict[str, Any]:
        return {"state": ""} if rank in self.members.dead else await self._calls.stack_of(rank)

    # --- what ranks say ---

    def _on_message(self, rank: int, message: Message) -> None:
        if isinstance(message, Joined):
            self._rendezvous.hear(rank, message)
        elif not self._calls.hear(rank, message):
            if isinstance(message, LogRecords):
                text = "".join(record.get("text", "") for record in message.records if record["kind"] == "stderr")
                self._last_output[rank] = (self._last_output.get(rank, "") + text)[-MAX_LAST_OUTPUT:]
            self._listener.on_message(rank, message)

    def _on_exit(self, rank: int, status: int, evidence: str) -> None:
        name, reason = describe_exit(status, evidence)
        printed = self._last_output.pop(rank, "")
        if has_dumped(status) and (place := crash_place(printed, self.cells)):
            reason += f" It was at {place}."
        if not self._listener.is_busy and (tail := printed.strip()[-MAX_LAST_WORDS:]):
            reason += f" Its last words:\n{tail}"
        if self.closed or not self.members.died(rank):
            return
        self._expect_nothing(rank, reason)
        self._listener.on_death(rank, name, reason)

    def _expect_nothing(self, rank: int, reason: str) -> None:
        """The rank will say no more: whoever waits for it is told why."""
        self._rendezvous.cannot_join(rank, reason)
        self._calls.expect_nothing(rank, reason)

    # --- description ---

    def rows(self, running: Sequence[int]) -> list[dict[str, Any]]:
        """Each rank now; `running` are those that execute something."""
        rows = []
        for rank, link in sorted(self.links.items()):
            state = "lost" if rank in self.members.dead else "running" if rank in running else "idle"
            rows.append({"rank": rank, "state": state, **link.describe()})
        return rows
