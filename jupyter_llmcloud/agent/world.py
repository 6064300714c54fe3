"""A world on its leading agent: a set of ranks with one process group, one run at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.agent.active_run import ActiveRun
from jupyter_llmcloud.agent.connection import Connection
from jupyter_llmcloud.agent.shares import Shares
from jupyter_llmcloud.core.exits import describe_exit
from jupyter_llmcloud.core.frames import Message
from jupyter_llmcloud.core.lifecycle import Finish
from jupyter_llmcloud.core.messages import Done, Execute, Names, Pull, Push, RankState, Refused, RunEnded, StartWorld
from jupyter_llmcloud.core.rank_messages import CellEnded, DumpStacks, Joined, Printed, RankLooked
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError, WorldError
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

if TYPE_CHECKING:
    from jupyter_llmcloud.agent.agent import Agent

JOIN_TIMEOUT_S = 120.0
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
        self.run: ActiveRun | None = None
        self.queued: list[str] = []
        self.closed = False
        self._spec = spec
        self.shares = Shares(agent, spec, self._on_message, self._on_exit)
        self._links = self.shares.links
        self._dead: set[int] = set()
        self._renew = False
        self._turn = asyncio.Lock()
        self._joining: dict[int, asyncio.Future[Joined]] = {}
        self._answers: dict[tuple[int, int], asyncio.Future[Message]] = {}
        self._num_requests = 0
        self._last_words: dict[int, str] = {}
        self._waiting: dict[str, asyncio.Future[Any]] = {}  # turns, by run
        self._definitions: list[Execute] = []
        self._notes: list[str] = []
        self._missing: dict[int, set[str]] = {}  # what ranks lacked after they were replaced
        self._cells: dict[str, int] = {}  # execution counts by the files of notebook cells
        self._looks: dict[int, asyncio.Future[RankLooked]] = {}

    # --- start and end ---

    async def start(self) -> None:
        """Fork the ranks on every agent and join them to one process group."""
        try:
            await self.shares.start(self._spec.agents, self.world_size)
            await self._join_all(0)
        except BaseException:
            self.close()
            raise

    async def resize(self, num_ranks: int, shares: list[dict[str, Any]]) -> None:
        """Have `num_ranks` ranks: the highest end, or more are started on `shares`. The others keep their variables."""
        async with self._turn:
            await self._heal()
            before, self.world_size = self.world_size, num_ranks
            if num_ranks < before:
                self.shares.drop(num_ranks)
            else:
                if self.agent.cluster.can_be_asked:  # how others are reached from here is known here alone
                    shares = await self.agent.cluster.find(num_ranks - before)
                await self.shares.start(shares, num_ranks)
            await self._join_all(self.generation + 1)
            for rank in range(before, num_ranks):
                self._notes.append(await self._restore(rank, list(range(before, num_ranks))))

    async def _join_all(self, generation: int) -> None:
        self._check_open()
        loop = asyncio.get_running_loop()
        self.generation = generation  # also when it fails: what was said in the store would confuse the next
        self._joining = {rank: loop.create_future() for rank in range(self.world_size)}
        for rank in self._dead & self._joining.keys():
            self._joining[rank].set_result(Joined(generation=-1, error="its process has ended already."))
        self.shares.join(generation, self.world_size)
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                joined = await asyncio.gather(*self._joining.values())
        except TimeoutError:
            late = [rank for rank, future in self._joining.items() if not future.done() or future.cancelled()]
            raise WorldError(f"ranks {late} did not join the process group in {JOIN_TIMEOUT_S:g} s.") from None
        for rank, answer in enumerate(joined):
            if answer.error:
                raise WorldError(f"rank {rank} could not join the process group: {answer.error}")
        self._renew = False

    def close(self) -> None:
        """End every rank; whoever follows its run is told."""
        self.closed = True
        if self.run is not None and not self.run.ended.done():
            self.run.stop()
        self.shares.close()
        for rank in range(self.world_size):
            self._expect_nothing(rank, "the world was stopped.")
        if self.run is not None:
            for rank in self.run.cell.ranks:
                self.run.rank_died(rank, "WorldError", "the world was stopped.")

    # --- runs ---

    async def execute(self, cell: Execute, connection: Connection | None) -> None:
        """Execute a cell when it is its turn; `connection` follows it."""
        if not await self._take_turn(cell.run_id, connection):
            self._never_began(cell, connection, "stopped")
            return
        try:
            await self._heal()
            await self._execute(cell, connection)
        except LLMCloudError as error:
            if connection is not None:
                raise
            self._never_began(cell, None, "failed", error)  # there is nobody to refuse it to
        finally:
            self.run = None
            self.idle_since = time.monotonic()
            self._turn.release()

    async def _take_turn(self, run_id: str, connection: Connection | None) -> bool:
        """Wait until no other run is under way; False when the run was stopped meanwhile."""
        if not self._turn.locked() and not self._waiting:
            return await self._turn.acquire()
        if connection is not None:
            ahead = f"for {self.run.record.run_id} to end" if self.run else "until the ranks have answered a request"
            connection.send(RankState(run_id=run_id, rank=-1, state="queued", detail=f"waits {ahead}"))
        self.queued.append(run_id)
        turn = self._waiting[run_id] = asyncio.ensure_future(self._turn.acquire())
        try:
            await asyncio.wait([turn])
        finally:
            turn.cancel()  # no effect when it has come
            self.queued.remove(run_id)
            del self._waiting[run_id]
        return not turn.cancelled()

    def _never_began(
        self, cell: Execute, connection: Connection | None, state: str, error: Exception | None = None
    ) -> None:
        """The end of a run that was stopped in the queue, or found no ranks."""
        record = self._record(cell)
        record.state, record.ended = state, time.time()
        if error is not None:
            ename, evalue = type(error).__name__, str(error)
            record.errors = [
                {"rank": record.ranks[0], "ename": ename, "evalue": evalue, "traceback": [f"{ename}: {evalue}"]}
            ]
        with contextlib.suppress(OSError):
            RunFolder(Path(cell.folder)).create(record, cell.source or cell.code)
        if connection is not None:
            report = ["It had not begun: no rank has executed any of it."]
            connection.send(RunEnded(run_id=cell.run_id, state=state, errors=record.errors, report=report))

    def _record(self, cell: Execute) -> RunRecord:
        return RunRecord(
            run_id=cell.run_id,
            name=cell.name,
            created=time.time(),
            ranks=cell.ranks or list(range(self.world_size)),
            world_size=self.world_size,
            world_id=self.world_id,
            cluster=cell.cluster,
            agent=cell.agent or self.agent.address,
            owner=cell.owner,
            options=cell.options,
        )

    async def _execute(self, cell: Execute, connection: Connection | None) -> None:
        self._cells[cell.filename] = cell.execution_count
        record = self._record(cell)
        folder = RunFolder(Path(cell.folder))
        self.run = ActiveRun(replace(cell, ranks=record.ranks, reply_to=0), self._links, record, folder)
        if connection is not None:
            self.run.followers.add(connection)
        try:
            self.run.begin()
        except OSError as error:
            raise WorldError(f"the run's folder cannot be made: {error.strerror}: {cell.folder}.") from None
        for note in self._notes:
            self.run.tell(RankState(run_id=cell.run_id, rank=-1, state="note", detail=note))
        self._notes.clear()
        await self._see_through(self.run)
        self._after(cell, self.run.ended.result())

    async def _see_through(self, run: ActiveRun) -> None:
        """Wait for the end of a run; as long as it may be executed again, heal the world and do so."""
        finish = await run.attempt
        while (again := run.again) is not None:
            self._renew = self._renew or finish.renew
            await asyncio.wait([run.ended], timeout=again.delay_s)
            try:
                await self._heal()
                checkpoint = None if again.from_start else await run.checkpoints.newest()
            except (LLMCloudError, OSError) as error:
                if run.again is not None:
                    run.cannot_restart(error)
                continue
            if run.again is None:
                break  # stopped meanwhile
            run.begin_again(checkpoint, self._notes)
            self._notes.clear()
            finish = await run.attempt
        await run.ended

    def _after(self, cell: Execute, finish: Finish) -> None:
        self._renew = self._renew or finish.renew
        if cell.is_definition and finish.state == "finished" and len(self._links) == len(cell.ranks or self._links):
            self._definitions.append(cell)

    async def _heal(self) -> None:
        """Replace ranks that have died, and renew the group when it cannot be used."""
        self._check_open()
        if not self.shares.has_store and (self._dead or self._renew):
            raise WorldError("the process that holds the world's store has ended: start new ranks with %world restart.")
        if not self._dead and not self._renew:
            return
        replaced = sorted(self._dead)
        self._dead.clear()
        try:
            self._notes += await self.shares.replace(replaced, self.world_size)
        except BaseException as error:
            self._dead.update(replaced)
            if isinstance(error, Exception):
                self._check_open()
            raise
        await self._join_all(self.generation + 1)
        for rank in replaced:
            self._notes.append(await self._restore(rank, replaced))

    def _check_open(self) -> None:
        if self.closed:
            raise WorldError("the world has been stopped.")

    async def _restore(self, rank: int, replaced: list[int]) -> str:
        """Run the definition cells on a rank that was replaced; says what could not be restored."""
        for cell in self._definitions:
            await self._ask(rank, replace(cell, ranks=[rank], save=[], pull=[]))
        number = len(self._definitions)
        note = f"rank {rank} is a new process; {number} definition cells were run on it again."
        survivors = [other for other in self._links if other not in replaced]
        if not survivors:
            return note + " What other cells had made is gone: no rank is left that has it."
        known = (await self._ask(survivors[0], Names(world_id=self.world_id, names=[]))).values
        names = {*known["own"], *self._missing.get(survivors[0], ())}
        asked = Names(world_id=self.world_id, names=sorted(names))
        missing = (await self._ask(rank, asked)).values["missing"]
        if imported := [name for name in missing if name in known["imported"]]:
            await self._import(rank, survivors[0], imported)
            missing = (await self._ask(rank, asked)).values["missing"]
        self._missing[rank] = set(missing)
        return note + (f" Not restored: {', '.join(missing)}." if missing else " Nothing is missing.")

    async def _import(self, rank: int, survivor: int, names: list[str]) -> None:
        """Have what another rank has imported, in whatever cell; pickled it is a reference."""
        answer = await self._ask(survivor, Pull(world_id=self.world_id, names=names))
        if isinstance(answer, Done):
            await self._ask(rank, Push(world_id=self.world_id, payload=answer.payload))

    def stop_run(self, run_id: str) -> None:
        """Stop pressed for a run that is executed or queued here."""
        if self.run is not None and self.run.record.run_id == run_id:
            self.run.stop()
        elif run_id in self._waiting:
            self._waiting[run_id].cancel()
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

    async def stacks(self) -> dict[str, Any]:
        """What every thread of every rank is doing now, also while a run goes on; silent ranks are looked at."""
        ranks = sorted(self._links)
        rows = await asyncio.gather(*map(self._stack_of, ranks))
        return {"ranks": {str(rank): row for rank, row in zip(ranks, rows, strict=True)}, "cells": self._cells}

    async def _stack_of(self, rank: int) -> dict[str, Any]:
        if rank in self._dead:
            return {"state": ""}
        try:
            async with asyncio.timeout(STACKS_TIMEOUT_S):
                answer = await self._ask(rank, DumpStacks(world_id=self.world_id))
            return answer.values if isinstance(answer, Done) else {"state": ""}
        except TimeoutError:
            return await self._look_at(rank)

    async def _look_at(self, rank: int) -> dict[str, Any]:
        looked = self._looks[rank] = self._looks.get(rank) or asyncio.get_running_loop().create_future()
        self._links[rank].look(dump=True)
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
        elif isinstance(message, Done | Refused | CellEnded) and message.reply_to:
            answer = self._answers.pop((rank, message.reply_to), None)
            if answer is not None and not answer.done():
                answer.set_result(message)
        else:
            if isinstance(message, RankLooked) and message.dumped and (looked := self._looks.pop(rank, None)):
                looked.set_result(message)
            if isinstance(message, Printed):
                text = "".join(record.get("text", "") for record in message.records if record["kind"] == "stderr")
                self._last_words[rank] = (self._last_words.get(rank, "") + text)[-2000:]
            if self.run is not None:
                self.run.on_message(rank, message)

    def _on_exit(self, rank: int, status: int, evidence: str) -> None:
        name, reason = describe_exit(status, evidence)
        if self.run is None and (words := self._last_words.get(rank, "").strip()):
            reason += f" Its last words:\n{words}"
        if self.closed or rank >= self.world_size:
            return
        self._dead.add(rank)
        self._expect_nothing(rank, reason)
        if self.run is not None:
            self.run.rank_died(rank, name, reason)

    def _expect_nothing(self, rank: int, reason: str) -> None:
        """The rank will answer no more: whoever waits for it is told why."""
        waiting = self._joining.get(rank)
        if waiting is not None and not waiting.done():
            waiting.set_result(Joined(generation=-1, error=reason))
        for (asked, number), answer in list(self._answers.items()):
            if asked == rank and not answer.done():
                del self._answers[(asked, number)]
                answer.set_result(Refused(error="WorldError", reason=f"rank {rank}: {reason}"))

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
