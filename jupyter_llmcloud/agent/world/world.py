"""A world on its leading agent: a set of ranks with one process group, one run at a time."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.agent.ranks.rank_groups import RankGroups
from jupyter_llmcloud.agent.runs.supervisor import RunSupervisor
from jupyter_llmcloud.agent.world.replay_cells import Definitions
from jupyter_llmcloud.agent.world.run_queue import RunQueue
from jupyter_llmcloud.core.run.exits import describe_exit
from jupyter_llmcloud.errors import LLMCloudError, UsageError, WorldError
from jupyter_llmcloud.protocol.agent_messages import StartWorld, WorldDescription, WorldStacks
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rank_messages import DumpRankStacks, Joined, Printed, RankLooked, Release
from jupyter_llmcloud.protocol.rpc import Calls, R, Reply, Request

if TYPE_CHECKING:
    from jupyter_llmcloud.agent.agent import Agent

JOIN_TIMEOUT_S = 120.0
RELEASE_TIMEOUT_S = 5.0
STACKS_TIMEOUT_S = 2.0


class World:
    """Started by `start`; executes runs in the order they come."""

    def __init__(self, agent: Agent, spec: StartWorld) -> None:
        self.agent = agent
        self.world_id = spec.world_id
        self.owner = spec.owner
        self.lease_s = spec.lease_s
        self.world_size = sum(share["num_ranks"] for share in spec.agents)
        self.generation = -1
        self.owners: set[Connection] = set()
        self.idle_since = time.monotonic()
        self.run: RunSupervisor | None = None
        self.queued: list[str] = []
        self.closed = False
        self.spec = spec
        self.shares = RankGroups(agent, spec, self._on_message, self._on_exit)
        self.links = self.shares.links
        self._dead: set[int] = set()
        self.must_renew = False
        self._joining: dict[int, asyncio.Future[Joined]] = {}
        self._calls: defaultdict[int, Calls] = defaultdict(lambda: Calls("a rank"))  # by rank
        self._last_words: dict[int, str] = {}
        self.definitions = Definitions(spec.world_id, self._ask)
        self.notes: list[str] = []
        self.cells: dict[str, int] = {}  # execution counts by the files of notebook cells
        self._looks: dict[int, asyncio.Future[RankLooked]] = {}
        self.runs = RunQueue(self)

    # --- start and end ---

    async def start(self) -> None:
        """Fork the ranks on every agent and join them to one process group."""
        try:
            await self.shares.start(self.spec.agents, self.world_size)
            await self._join_all(0)
        except BaseException:
            self.close()
            raise

    async def resize(self, num_ranks: int, shares: list[dict[str, Any]]) -> None:
        """Have `num_ranks` ranks: the highest end, or more are started on `shares`. The others keep their variables."""
        async with self.runs.turn:
            await self.heal()
            before, self.world_size = self.world_size, num_ranks
            if num_ranks < before:
                self.shares.drop(num_ranks)
            else:
                if self.agent.cluster.can_be_asked:  # how others are reached from here is known here alone
                    shares = await self.agent.cluster.find(num_ranks - before)
                await self.shares.start(shares, num_ranks)
            await self._join_all(self.generation + 1)
            self.notes += await self.definitions.restore(range(before, num_ranks), self.links)

    async def _join_all(self, generation: int) -> None:
        self._check_open()
        loop = asyncio.get_running_loop()
        self.generation = generation  # also when it fails: what was said in the store would confuse the next
        self._joining = {rank: loop.create_future() for rank in range(self.world_size)}
        for rank in self._dead & self._joining.keys():
            self._joining[rank].set_result(Joined(generation=-1, error="its process has ended already."))
        self.shares.join(generation, self.world_size)
        first = await self._first_that_cannot_join(JOIN_TIMEOUT_S)
        self.must_renew = True
        if first:
            for link in self.links.values():
                link.send(Release(generation=generation))  # who waits for it would wait in vain
            await self._first_that_cannot_join(RELEASE_TIMEOUT_S, wait_for_all=True)
            raise WorldError(first)
        late = [rank for rank, future in self._joining.items() if not future.done()]
        if late:
            raise WorldError(f"ranks {late} did not join the process group in {JOIN_TIMEOUT_S:g} s.")
        self.must_renew = False

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

    def beat(self) -> None:
        """Called every second: ranks beside a leader that stands still end before another one leads."""
        self.shares.live_until(self.runs.until)

    def leave(self) -> None:
        """The host or its place in a batch system is taken away: a run with restarts goes on elsewhere."""
        if self.runs.leave():
            self.closed = True
            self.shares.leave()
        else:
            self.close("the node agent was told to end (SIGTERM), with its host or its place in a batch system.")

    def close(self, taken_away: str = "") -> None:
        """End every rank, as after a Stop unless its place was `taken_away`; whoever follows its run is told."""
        self.closed = True
        run = self.runs.active
        if run is not None and not run.ended.done() and not taken_away:
            run.stop()
        self.shares.close()
        for rank in range(self.world_size):
            self._expect_nothing(rank, "the world was stopped.")
        if run is not None and not run.ended.done():
            for rank in run.cell.ranks:
                run.rank_died(rank, "RankLost" if taken_away else "WorldError", taken_away or "the world was stopped.")

    async def find_room(self) -> list[dict[str, Any]]:
        """A place for the ranks whose agent has gone. Raises Busy when the cluster has none now."""
        num_ranks = len(self.shares.homeless(self._dead)) if self.links else self.world_size
        return await self.agent.cluster.find(num_ranks) if num_ranks else []

    async def heal(self, room: Sequence[dict[str, Any]] = ()) -> None:
        """Replace ranks that have died, and renew the group when it cannot be used; `room` was found for them."""
        self._check_open()
        if not self.shares.has_store and (self._dead or self.must_renew):
            raise WorldError("the process that holds the world's store has ended: start new ranks with %world restart.")
        if not self.links:
            await self._start_anew(room)
        if not self._dead and not self.must_renew:
            return
        replaced = sorted(self._dead)
        self._dead.clear()
        try:
            self.notes += await self.shares.replace(replaced, self.world_size, room)
        except BaseException as error:
            self._dead.update(replaced)
            if isinstance(error, Exception):
                self._check_open()
            raise
        await self._join_all(self.generation + 1)
        self.notes += await self.definitions.restore(replaced, self.links)

    async def _start_anew(self, room: Sequence[dict[str, Any]]) -> None:
        """All ranks of a world that is led from here now, wherever there is room."""
        self._dead.clear()
        try:
            await self.shares.start(room or await self.find_room(), self.world_size)
            await self._join_all(0)
        except BaseException:
            self.shares.reset()
            raise
        self.notes += await self.definitions.restore(list(self.links), self.links)

    def _check_open(self) -> None:
        if self.closed:
            raise WorldError("the world has been stopped.")

    # --- requests to single ranks ---

    async def ask(self, rank: int, request: Request[R]) -> R:
        """Send a request to a rank and wait for its reply; raises what it refuses with."""
        if rank not in self.links:
            raise UsageError(f"there is no rank {rank}: the world has ranks 0-{self.world_size - 1}.")
        async with self.runs.turn:
            await self.heal()
            return await self._ask(rank, request)

    async def _ask(self, rank: int, request: Request[R]) -> R:
        return await self._calls[rank].ask(request, self.links[rank].send)

    async def stacks(self) -> WorldStacks:
        """What every thread of every rank is doing now, also while a run goes on; silent ranks are looked at."""
        ranks = sorted(self.links)
        rows = await asyncio.gather(*map(self._stack_of, ranks))
        return WorldStacks(ranks=dict(zip(ranks, rows, strict=True)), cells=self.cells)

    async def _stack_of(self, rank: int) -> dict[str, Any]:
        if rank in self._dead:
            return {"state": ""}
        try:
            async with asyncio.timeout(STACKS_TIMEOUT_S):
                return (await self._ask(rank, DumpRankStacks())).as_dict()
        except LLMCloudError:
            return {"state": ""}
        except TimeoutError:
            return await self._look_at(rank)

    async def _look_at(self, rank: int) -> dict[str, Any]:
        looked = self._looks[rank] = self._looks.get(rank) or asyncio.get_running_loop().create_future()
        self.links[rank].look(dump=True)
        try:
            async with asyncio.timeout(STACKS_TIMEOUT_S):
                look = await asyncio.shield(looked)
        except TimeoutError:
            return {"state": ""}
        return {"state": look.state, "busy": look.busy, "dump": look.dump}

    # --- what ranks say ---

    def _on_message(self, rank: int, message: Message) -> None:
        if isinstance(message, Joined):
            waiting = self._joining.get(rank)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif isinstance(message, Reply) and message.reply_to:
            self._calls[rank].take(message)
        else:
            if isinstance(message, RankLooked) and message.dumped and (looked := self._looks.pop(rank, None)):
                looked.set_result(message)
            if isinstance(message, Printed):
                text = "".join(record.get("text", "") for record in message.records if record["kind"] == "stderr")
                self._last_words[rank] = (self._last_words.get(rank, "") + text)[-2000:]
            if self.runs.active is not None:
                self.runs.active.on_message(rank, message)

    def _on_exit(self, rank: int, status: int, evidence: str) -> None:
        name, reason = describe_exit(status, evidence)
        if self.runs.active is None and (words := self._last_words.get(rank, "").strip()):
            reason += f" Its last words:\n{words}"
        if self.closed or rank >= self.world_size:
            return
        self._dead.add(rank)
        self._expect_nothing(rank, reason)
        if self.runs.active is not None:
            self.runs.active.rank_died(rank, name, reason)

    def _expect_nothing(self, rank: int, reason: str) -> None:
        """The rank will answer no more: whoever waits for it is told why."""
        waiting = self._joining.get(rank)
        if waiting is not None and not waiting.done():
            waiting.set_result(Joined(generation=-1, error=reason))
        if (calls := self._calls.pop(rank, None)) is not None:  # one that takes its place is asked anew
            calls.fail(WorldError(f"rank {rank}: {reason}"))

    # --- description ---

    def describe(self) -> WorldDescription:
        """For `%world` and the server."""
        rows = []
        for rank, link in sorted(self.links.items()):
            busy = self.runs.active is not None and rank in self.runs.active.cell.ranks
            state = "lost" if rank in self._dead else "running" if busy else "idle"
            rows.append({"rank": rank, "state": state, **link.describe()})
        return WorldDescription(
            world_id=self.world_id,
            world_size=self.world_size,
            owner=self.owner,
            generation=self.generation,
            run_id=self.runs.active.record.run_id if self.runs.active else "",
            ranks=rows,
        )
