"""A world on its leading agent: a set of ranks with one process group, one run at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.agent.active_run import ActiveRun
from jupyter_llmcloud.agent.connection import Connection
from jupyter_llmcloud.agent.hosted_ranks import HostedRanks
from jupyter_llmcloud.agent.remote_ranks import RemoteRanks
from jupyter_llmcloud.core.exits import describe_exit
from jupyter_llmcloud.core.lifecycle import Finish
from jupyter_llmcloud.core.messages import (
    CellEnded,
    Done,
    Execute,
    Join,
    Joined,
    Message,
    Names,
    Printed,
    RankState,
    Refused,
    RunEnded,
    StartWorld,
)
from jupyter_llmcloud.errors import NotFound, UsageError, WorldError
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

if TYPE_CHECKING:
    from jupyter_llmcloud.agent.agent import Agent
    from jupyter_llmcloud.agent.local_rank import RankLink

JOIN_TIMEOUT_S = 120.0


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
        self.run: ActiveRun | None = None
        self.queued: list[str] = []
        self.closed = False
        self._spec = spec
        self._store = ""
        self._hosts: list[HostedRanks | RemoteRanks] = []
        self._links: dict[int, RankLink] = {}
        self._dead: set[int] = set()
        self._renew = False
        self._turn = asyncio.Lock()
        self._joining: dict[int, asyncio.Future[Joined]] = {}
        self._answers: dict[tuple[int, int], asyncio.Future[Message]] = {}
        self._num_requests = 0
        self._last_words: dict[int, str] = {}
        self._stopped_in_queue: set[str] = set()
        self._definitions: list[Execute] = []
        self._notes: list[str] = []

    # --- start and end ---

    async def start(self) -> None:
        """Fork the ranks on every agent and join them to one process group."""
        self._store = await self.agent.start_store(self.world_id, self._spec.agents)
        try:
            await self._start_shares(self._spec.agents)
            await self._join_all(0)
        except BaseException:
            self.close()
            raise

    async def _start_shares(self, shares: list[dict[str, Any]]) -> None:
        for share in shares:
            first = len(self._links)
            await self._start_share(share["address"], list(range(first, first + share["num_ranks"])))

    async def resize(self, num_ranks: int, shares: list[dict[str, Any]]) -> None:
        """Have `num_ranks` ranks: the highest end, or more are started on `shares`. The others keep their variables."""
        async with self._turn:
            await self._heal()
            before, self.world_size = self.world_size, num_ranks
            if num_ranks < before:
                for host in self._hosts:
                    host.drop([rank for rank in sorted(host.links, reverse=True) if rank >= num_ranks])
                self._links = {rank: link for rank, link in self._links.items() if rank < num_ranks}
            else:
                await self._start_shares(shares)
            await self._join_all(self.generation + 1)
            for rank in range(before, num_ranks):
                self._notes.append(await self._restore(rank, list(range(before, num_ranks))))

    async def _start_share(self, address: str, ranks: list[int]) -> None:
        kind: Callable[..., HostedRanks | RemoteRanks]
        kind = self.agent.host_ranks if address == self.agent.address else self.agent.reach_ranks(address)
        host = kind(
            world_id=f"{self.world_id}#{len(self._hosts)}",
            world_size=self.world_size,
            local_world_size=len(ranks),
            store=self._store,
            cwd=self._spec.cwd,
            env=self._spec.env,
            on_message=self._on_message,
            on_exit=self._on_exit,
        )
        self._hosts.append(host)
        await host.start(ranks, list(range(len(ranks))))
        self._links.update(host.links)

    async def _join_all(self, generation: int) -> None:
        loop = asyncio.get_running_loop()
        self._joining = {rank: loop.create_future() for rank in range(self.world_size)}
        for link in self._links.values():
            link.send(Join(generation=generation, world_size=self.world_size))
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                joined = await asyncio.gather(*self._joining.values())
        except TimeoutError:
            late = [rank for rank, future in self._joining.items() if not future.done() or future.cancelled()]
            raise WorldError(f"ranks {late} did not join the process group in {JOIN_TIMEOUT_S:g} s.") from None
        for rank, answer in enumerate(joined):
            if answer.error:
                raise WorldError(f"rank {rank} could not join the process group: {answer.error}")
        self.generation = generation
        self._renew = False

    def close(self) -> None:
        """End every rank; whoever follows its run is told."""
        self.closed = True
        if self.run is not None and not self.run.ended.done():
            self.run.stop()
        for host in self._hosts:
            host.close()
        self.agent.end_store(self.world_id)

    # --- runs ---

    async def execute(self, cell: Execute, connection: Connection | None) -> None:
        """Execute a cell when it is its turn; `connection` follows it."""
        self.queued.append(cell.run_id)
        if connection is not None and (self.run is not None or self._turn.locked()):
            ahead = self.run.record.run_id if self.run else "another run"
            connection.send(RankState(run_id=cell.run_id, rank=-1, state="queued", detail=f"waits for {ahead} to end"))
        async with self._turn:
            self.queued.remove(cell.run_id)
            if cell.run_id in self._stopped_in_queue:
                self._stopped_in_queue.discard(cell.run_id)
                if connection is not None:
                    connection.send(RunEnded(run_id=cell.run_id, state="stopped"))
                return
            await self._heal()
            try:
                await self._execute(cell, connection)
            finally:
                self.run = None
                self.idle_since = time.monotonic()

    async def _execute(self, cell: Execute, connection: Connection | None) -> None:
        ranks = cell.ranks or list(range(self.world_size))
        folder = RunFolder(Path(cell.folder))
        record = RunRecord(
            run_id=cell.run_id,
            name=cell.name,
            created=time.time(),
            ranks=ranks,
            world_size=self.world_size,
            world_id=self.world_id,
            cluster=cell.cluster,
            agent=self.agent.address,
            owner=cell.owner,
            options=cell.options,
        )
        self.run = ActiveRun(replace(cell, ranks=ranks, reply_to=0), self._links, record, folder)
        if connection is not None:
            self.run.followers.add(connection)
        self.run.begin()
        for note in self._notes:
            self.run.tell(RankState(run_id=cell.run_id, rank=-1, state="note", detail=note))
        self._notes.clear()
        self._after(cell, await self.run.ended)

    def _after(self, cell: Execute, finish: Finish) -> None:
        self._renew = self._renew or finish.renew
        if cell.is_definition and finish.state == "finished" and len(self._links) == len(cell.ranks or self._links):
            self._definitions.append(cell)

    async def _heal(self) -> None:
        """Replace ranks that have died, and renew the group when it cannot be used."""
        if self.closed:
            raise WorldError("the world has been stopped.")
        if not self._dead and not self._renew:
            return
        replaced = sorted(self._dead)
        for rank in replaced:
            host = next(host for host in self._hosts if rank in host.links)
            await host.start([rank], [list(host.links).index(rank)])
            self._links[rank] = host.links[rank]
        self._dead.clear()
        await self._join_all(self.generation + 1)
        for rank in replaced:
            self._notes.append(await self._restore(rank, replaced))

    async def _restore(self, rank: int, replaced: list[int]) -> str:
        """Run the definition cells on a rank that was replaced; says what could not be restored."""
        for cell in self._definitions:
            await self._ask(rank, replace(cell, ranks=[rank], save=[], pull=[]))
        number = len(self._definitions)
        note = f"rank {rank} is a new process; {number} definition cells were run on it again."
        survivors = [other for other in self._links if other not in replaced]
        if not survivors:
            return note
        names = (await self._ask(survivors[0], Names(world_id=self.world_id, names=[]))).values["own"]
        missing = (await self._ask(rank, Names(world_id=self.world_id, names=names))).values["missing"]
        return note + (f" Not restored: {', '.join(missing)}." if missing else " Nothing is missing.")

    def stop_run(self, run_id: str) -> None:
        """Stop pressed for a run that is executed or queued here."""
        if self.run is not None and self.run.record.run_id == run_id:
            self.run.stop()
        elif run_id in self.queued:
            self._stopped_in_queue.add(run_id)
        else:
            raise NotFound(f"run {run_id!r} has ended.")

    # --- requests to single ranks ---

    async def ask(self, rank: int, message: Any) -> Done:
        """Send a request to a rank and wait for its answer; raises what it refuses with."""
        if rank not in self._links:
            raise UsageError(f"there is no rank {rank}: the world has ranks 0-{self.world_size - 1}.")
        async with self._turn:
            await self._heal()
            reply = await self._ask(rank, message)
        if isinstance(reply, Refused):
            raise UsageError(reply.reason)
        return reply

    async def _ask(self, rank: int, message: Any) -> Any:
        self._num_requests += 1
        number = self._num_requests
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._answers[(rank, number)] = answer
        self._links[rank].send(replace(message, reply_to=number))
        return await answer

    # --- what ranks say ---

    def _on_message(self, rank: int, message: Message) -> None:
        if isinstance(message, Joined):
            waiting = self._joining.get(rank)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif isinstance(message, Done | Refused | CellEnded) and message.reply_to:
            answer = self._answers.pop((rank, message.reply_to), None)
            if answer is not None and not answer.done():
                answer.set_result(message)
        else:
            if isinstance(message, Printed):
                text = "".join(record.get("text", "") for record in message.records if record["kind"] == "stderr")
                self._last_words[rank] = (self._last_words.get(rank, "") + text)[-2000:]
            if self.run is not None:
                self.run.on_message(rank, message)

    def _on_exit(self, rank: int, status: int) -> None:
        name, reason = describe_exit(status)
        if self.run is None and (words := self._last_words.get(rank, "").strip()):
            reason += f" Its last words:\n{words}"
        if self.closed:
            return
        self._dead.add(rank)
        waiting = self._joining.get(rank)
        if waiting is not None and not waiting.done():
            waiting.set_result(Joined(generation=-1, error=reason))
        for (asked, number), answer in list(self._answers.items()):
            if asked == rank and not answer.done():
                del self._answers[(asked, number)]
                answer.set_result(Refused(error="WorldError", reason=f"rank {rank}: {reason}"))
        if self.run is not None:
            self.run.rank_died(rank, name, reason)

    # --- description ---

    def describe(self) -> dict[str, Any]:
        """For `%world` and the server."""
        rows = []
        for rank, link in sorted(self._links.items()):
            busy = self.run is not None and rank in self.run.cell.ranks
            state = "lost" if rank in self._dead else "running" if busy else "idle"
            rows.append({"rank": rank, "state": state, **link.describe()})
        return {
            "world_id": self.world_id,
            "world_size": self.world_size,
            "owner": self.owner,
            "generation": self.generation,
            "run_id": self.run.record.run_id if self.run else "",
            "ranks": rows,
        }
