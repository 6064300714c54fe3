"""A run without ranks: `python -m tests.bench.bodies.feed_run FOLDER RANKS POINTS_PER_S SECONDS` writes what so many
ranks would log.

Its journals are written as the agent of a real run writes them, and a socket says that the run goes on.
"""

import asyncio
import sys
import time
from pathlib import Path

from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from tests.support.recorded_runs import answer_as_agent

TICK_S = 0.02


async def main(folder: Path, num_ranks: int, per_s: int, seconds: float) -> None:
    address = str(folder / "feeder.sock")
    server = await answer_as_agent(address, "fed")
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
