"""python -m jupyter_llmcloud.agent --folder DIR --name NAME: the node agent process."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
from collections.abc import Mapping
from pathlib import Path

from jupyter_llmcloud import config
from jupyter_llmcloud.agent.agent import Agent, Lifetimes
from jupyter_llmcloud.system.processes import allow_many_open_files

AGENT_LEASE_S = 900.0
# Dask's nanny hands down a trim threshold of 64 KiB, with which a training step returns all its memory to the system
# and faults it in again: 60,000 page faults a step.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
# The same step takes up to three per cent less processor time where its addresses are found in huge pages.
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
# OpenMP threads that spin while they wait are three to five times slower as soon as anything else wants a core; and the
# zygote must have one thread only, each rank sets its own number.
THREADS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What the processes that the agent starts inherit, of `given` and besides."""
    tunables = given.get(TUNABLES, "")
    if HUGE_PAGES not in tunables:
        tunables = ":".join(filter(None, (tunables, f"{HUGE_PAGES}=1")))
    return {**THREADS, **given, **ALLOCATOR, TUNABLES: tunables}


async def _serve(arguments: argparse.Namespace) -> None:
    agent = Agent(
        arguments.folder,
        arguments.name,
        arguments.interface,
        arguments.slots,
        Lifetimes(config.lease_s(AGENT_LEASE_S), arguments.first_lease, config.leave_s(), arguments.stays),
    )
    await agent.serve()


def main() -> None:
    """Parse and serve."""
    parser = argparse.ArgumentParser(prog="jupyter_llmcloud.agent")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--interface", default="127.0.0.1")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--first-lease", type=float, default=0.0, help="seconds that it waits for its first worker")
    parser.add_argument(
        "--stays", type=float, default=0.0, help="seconds that what it has imported waits for the next agent"
    )
    os.environ.update(environment(os.environ))
    allow_many_open_files()
    gc.freeze()  # what was imported stays: collections that look through it again took a tenth of a short cell's time
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
