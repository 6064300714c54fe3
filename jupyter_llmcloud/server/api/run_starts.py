"""Runs that this server starts itself, without a kernel: until their agents have them.

Then a run belongs to its agent, as one that a kernel has left behind; the ranks that were started for it end with it.
"""

from __future__ import annotations

import ast
import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.names import run_id
from jupyter_llmcloud.core.spec import Interface, RunSpec, Script
from jupyter_llmcloud.errors import Busy, ConnectionLost, LLMCloudError, UsageError
from jupyter_llmcloud.protocol.agent_messages import StartWorld
from jupyter_llmcloud.protocol.run_request import execute_script
from jupyter_llmcloud.storage.resume import Resumption, resume
from jupyter_llmcloud.storage.runs import RunRecord, RunStore, nonce

if TYPE_CHECKING:
    from jupyter_llmcloud.cluster.clusters import ClusterPool
    from jupyter_llmcloud.protocol.client import AgentConnection

START_TIMEOUT_S = 300.0
WAIT_S = 0.25  # how often a run that waits for slots asks again
LEASE_S = 1.0  # of a world whose run has ended


@dataclass
class Start:
    """A run on its way to its agent.

    Attributes:
        is_handed_over: whether its agent has it, or may have it by now.
    """

    source: str
    script: Script
    spec: RunSpec
    record: RunRecord
    resumption: Resumption | None
    ticket: str = field(default_factory=nonce)
    is_handed_over: bool = False


class RunStarts:
    """Those that are on their way.

    Args:
        store: where runs are recorded.
        owner: how their records name this server.
        pool: gives the clusters.
        open_agent: opens a connection to a node agent.
    """

    def __init__(
        self,
        store: RunStore,
        owner: str,
        pool: Callable[[], Awaitable[ClusterPool]],
        open_agent: Callable[[str], Awaitable[AgentConnection]],
    ) -> None:
        self._store = store
        self._owner = owner
        self._pool = pool
        self._open_agent = open_agent
        self._starts: dict[str, Start] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._starts

    def __len__(self) -> int:
        return len(self._starts)

    async def start(self, source: str, given: Mapping[str, Any], script: Script) -> tuple[RunRecord, list[str]]:
        """Begin to start a run; returns its first record and what there is to say.

        Raises what it can be refused with at once: a syntax error, an option, a cluster that is too small.
        """
        start = await asyncio.to_thread(self._prepare, source, given, script)
        placement = await self._place(start)  # may be refused for good
        self._store.folder(start.record.run_id).create(start.record, source)
        name = start.record.run_id
        self._starts[name] = start
        task = self._tasks[name] = asyncio.create_task(self._see_to(start, placement))
        task.add_done_callback(lambda _: self._forget(name))
        said = list(start.resumption.notes) if start.resumption else []
        if placement and placement["started"]:
            said.append(f"Started the cluster {placement['cluster']!r} on this machine.")
        return start.record, said

    def _forget(self, name: str) -> None:
        del self._starts[name], self._tasks[name]

    def _prepare(self, source: str, given: Mapping[str, Any], script: Script) -> Start:
        spec = RunSpec.make(given, Interface.REST)
        check_syntax(source, script.file)
        resumption = resume(self._store, spec.resume, given) if spec.resume else None
        spec = resumption.spec if resumption else spec
        now = time.time()
        name = spec.name or "run"
        record = RunRecord(
            run_id(name, now, nonce()),
            name,
            created=now,
            world_size=spec.nproc or 0,
            cluster=spec.cluster or "",
            owner=self._owner,
            spec=spec.as_dict(),
            script=asdict(script),
            history=[{"t": round(now, 3), "state": "queued", "phase": "finding a cluster"}],
        )
        return Start(source, script, spec, record, resumption)

    # --- on its way ---

    async def _see_to(self, start: Start, placement: dict[str, Any] | None) -> None:
        try:
            await self._bring(start, placement)
        except asyncio.CancelledError:
            if start.is_handed_over:
                raise
            self._end(start.record, "stopped", "stopped before any rank had it.")
        except Exception as error:
            if not start.is_handed_over:
                self._end(start.record, "failed", "it could not be started.", error)
            if not isinstance(error, LLMCloudError):
                raise

    async def _bring(self, start: Start, placement: dict[str, Any] | None) -> None:
        while True:
            if placement is not None:
                try:
                    connection = await self._start_world(start, placement)
                    break
                except Busy as busy:
                    self._note(start.record, str(busy))
            await asyncio.sleep(WAIT_S)
            placement = await self._place(start)
        async with connection:
            await self._hand_over(start, placement, connection)

    async def _place(self, start: Start) -> dict[str, Any] | None:
        """Where its ranks go; None while there is no room for them."""
        pool = await self._pool()
        try:
            return await pool.place(start.spec.cluster, start.spec.nproc, start.ticket, priority=start.spec.priority)
        except Busy as busy:
            self._note(start.record, str(busy))
            return None

    async def _start_world(self, start: Start, placement: dict[str, Any]) -> AgentConnection:
        """A connection to the leading agent, which holds the new world as long as it is open."""
        self._phase(start.record, "starting ranks")
        connection = await self._open_agent(placement["agents"][0]["address"])
        request = StartWorld(
            world_id=placement["world_id"],
            agents=placement["agents"],
            owner=self._owner,
            cwd=start.script.folder,
            lease_s=LEASE_S,
        )
        try:
            await connection.request(request, START_TIMEOUT_S)
        except BaseException:
            await connection.close()
            raise
        return connection

    def _phase(self, record: RunRecord, name: str) -> None:
        if name != record.history[-1].get("phase"):
            record.history.append({"t": round(time.time(), 3), "phase": name})
            self._store.folder(record.run_id).write(record)

    async def _hand_over(self, start: Start, placement: dict[str, Any], connection: AgentConnection) -> None:
        record, address = start.record, placement["agents"][0]["address"]
        record.cluster, record.agent, record.world_id = placement["cluster"], address, placement["world_id"]
        record.world_size = placement["num_ranks"]
        record.ranks = list(range(record.world_size))
        folder = self._store.folder(record.run_id)
        folder.write(record)
        request = execute_script(
            start.source,
            start.script,
            start.spec,
            world_id=record.world_id,
            run_id=record.run_id,
            name=record.name,
            ranks=record.ranks,
            folder=str(folder.path),
            agent=address,
            cluster=record.cluster,
            owner=self._owner,
            background=True,
            asked=record.created,
            **(start.resumption.request if start.resumption else {}),
        )
        start.is_handed_over = True
        try:
            await asyncio.shield(connection.request(request, START_TIMEOUT_S))
        except ConnectionLost:  # the agent may have it all the same: it is asked by whoever looks at the run
            raise
        except LLMCloudError:
            start.is_handed_over = False  # it was refused
            raise

    def _note(self, record: RunRecord, why: str) -> None:
        """A word for whoever looks at the record; said once."""
        why = f"waits for free slots. {why}"
        if why not in [entry.get("why") for entry in record.history]:
            record.history.append({"t": round(time.time(), 3), "why": why})
            if record.run_id in self._starts:
                self._store.folder(record.run_id).write(record)

    def _end(self, record: RunRecord, state: str, why: str, error: Exception | None = None) -> None:
        record.state, record.ended, record.agent = state, time.time(), ""
        record.history.append({"t": round(record.ended, 3), "state": state, "why": why})
        if error is not None:
            ename, evalue = type(error).__name__, str(error)
            record.errors = [{"rank": 0, "ename": ename, "evalue": evalue, "traceback": [f"{ename}: {evalue}"]}]
        with suppress(OSError):
            self._store.folder(record.run_id).write(record)

    # --- their end ---

    async def stop(self, run_id: str) -> bool:
        """Stop a run that is on its way; False when its agent has it by now."""
        start, task = self._starts[run_id], self._tasks[run_id]
        if not start.is_handed_over:
            task.cancel()
        await asyncio.wait([task])
        return not start.is_handed_over

    async def close(self) -> None:
        """The server ends: what its agent does not have yet is not started."""
        await asyncio.gather(*map(self.stop, list(self._starts)))


def check_syntax(source: str, file: str) -> None:
    """Raises UsageError when the source is no Python."""
    try:
        compile(source, file or "<source>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}"
        raise UsageError(f"SyntaxError: {error.msg} ({where}). Nothing was started.") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nested deeper than Python reads
        raise UsageError(f"the source is no Python: {error or type(error).__name__}. Nothing was started.") from None
