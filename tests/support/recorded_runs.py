"""Runs on disk as their agents would have left them, and one that goes on without any rank: for whoever shows runs."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jupyter_llmcloud.protocol.agent_messages import AgentDescription, Describe
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.rpc import Responder
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore

TOOK_S = 600.0
Values = Mapping[str, float]


def record_run(
    run_id: str,
    name: str,
    values: Callable[[int], Iterable[Values]],
    *,
    num_ranks: int = 2,
    source: str = "%%distribute\npass\n",
    marks: Sequence[Mapping[str, Any]] = (),
    output: Mapping[int, Sequence[str]] | None = None,
    **fields: Any,
) -> RunFolder:
    """A run whose ranks logged `values(rank)`, one mapping a step; `fields` are further ones of its record."""
    began = time.time() - TOOK_S
    record = RunRecord(run_id, name, **{"state": "finished", "created": began, "cluster": "local", **fields})
    record.ranks, record.world_size = list(range(num_ranks)), num_ranks
    record.ended = None if record.is_active else began + TOOK_S
    folder = RunStore().folder(run_id)
    for rank in record.ranks:
        rows = list(values(rank))
        times = [began + TOOK_S * at / max(1, len(rows)) for at in range(len(rows))]
        _write(folder.metrics(rank), [{"t": t, "step": at, "values": dict(rows[at])} for at, t in enumerate(times)])
    for rank, lines in (output or {}).items():
        _write(folder.logs(rank), [{"t": began + at, "kind": "stdout", "text": text} for at, text in enumerate(lines)])
    _write(folder.marks, [{"t": began, **mark} for mark in marks])
    folder.create(record, source)
    return folder


def report_late(folder: RunFolder, late: Sequence[int]) -> None:
    """Some ranks do not go on, the others wait for them, as the agent writes it."""
    record = folder.read()
    text = f"ranks {', '.join(map(str, late))} have not made a step for 60 s; the others wait for them.\n"
    waiting = [rank for rank in record.ranks if rank not in late]
    report = {"kind": "report", "t": time.time(), "text": text, "late": list(late), "waiting": waiting}
    _write(folder.logs(late[0]), [report])
    record.hang = report
    folder.write(record)


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    JournalWriter(path).append(records)


async def answer_as_agent(address: str, world_id: str) -> asyncio.Server:
    """A socket that says the run of this world goes on: who shows a run asks its agent."""
    numbers = {"num_slots": 0, "free_slots": 0, "num_replicas": 0, "num_runs": 1}
    described = AgentDescription(
        name="stand-in", pid=os.getpid(), host="", address=address, has_gpus=False, begun=[], stands_by=[],
        worlds=[{"world_id": world_id}], **numbers,
    )  # fmt: skip
    responder = Responder("the stand-in")
    responder.on(Describe, lambda _: described)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer, "whoever asks")
        async for message in connection.messages():
            connection.send(await responder.answer(message))
        connection.close()

    return await asyncio.start_unix_server(connected, address)


async def _answer_until_told(address: str, world_id: str) -> None:
    server = await answer_as_agent(address, world_id)
    print("answers", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(_answer_until_told(*sys.argv[1:]))
