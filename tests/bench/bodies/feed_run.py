"""A run without ranks: `feed_run.py FOLDER RANKS POINTS_PER_S SECONDS` writes what so many ranks would log.

Its journals are written as the agent of a real run writes them, and a socket says that the run goes on.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from jupyter_llmcloud.protocol.agent_messages import AgentDescription, Describe
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.rpc import Responder
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunRecord, RunStore

TICK_S = 0.02


def describe(_: Describe, address: str, world_id: str) -> AgentDescription:
    numbers = {"num_slots": 0, "free_slots": 0, "num_replicas": 0, "num_runs": 1}
    return AgentDescription(
        name="feeder", pid=os.getpid(), host="", address=address, has_gpus=False, begun=[], stands_by=[],
        worlds=[{"world_id": world_id}], **numbers,
    )  # fmt: skip


async def main(folder: Path, num_ranks: int, per_s: int, seconds: float) -> None:
    address = str(folder / "feeder.sock")
    responder = Responder("the feeder")
    responder.on(Describe, lambda asked: describe(asked, address, "fed"))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer, "whoever asks")
        async for message in connection.messages():
            connection.send(await responder.answer(message))
        connection.close()

    server = await asyncio.start_unix_server(connected, address)
    ranks = list(range(num_ranks))
    record = RunRecord("fed-1", "fed", "running", time.time(), None, ranks, num_ranks, "fed", "", address)
    run = RunStore().folder(record.run_id)
    run.create(record, "")
    journals = [JournalWriter(run.metrics(rank)) for rank in ranks]
    began, step = time.monotonic(), 0
    while (now := time.monotonic() - began) < seconds:
        upto = int(now * per_s)
        for rank, journal in enumerate(journals):
            journal.append([{"step": at, "values": {"loss": 1 / (at + rank + 1)}} for at in range(step, upto)])
        step = upto
        await asyncio.sleep(max(0.0, TICK_S - (time.monotonic() - began - now)))
    record.state, record.ended = "finished", time.time()
    run.write(record)
    server.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
