"""Node agents of this host: how one is started, found again, and started ahead of the Dask worker that will hold it.

An agent's zygote imports for seconds, and so do a server, a scheduler and a worker. On a local cluster all of them run
on this host, so its agents begin first and import while the rest comes up. Nothing of Dask is imported here.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

from jupyter_llmcloud.cluster.record import cluster_folder
from jupyter_llmcloud.errors import WorldError
from jupyter_llmcloud.system.atomic_files import read_json, write_json
from jupyter_llmcloud.system.processes import is_process
from jupyter_llmcloud.system.spawn import log_tail, spawn

START_TIMEOUT_S = 60.0
STAYS_S = 15.0  # for how long what an agent has imported waits for the one that takes its place


def agent_folder(cluster_id: str, worker: object) -> Path:
    """Where the agent beside a worker of this name lives; made if need be."""
    folder = cluster_folder(cluster_id) / ("a" + re.sub(r"[^\w.-]", "_", str(worker))[-24:])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def living_agent(folder: Path) -> dict[str, Any] | None:
    """What the agent of a folder said of itself, if there is one and it lives."""
    known = read_json(folder / "agent.json")
    return known if known is not None and is_process(known["pid"], known["started"]) else None


def is_coming_up(folder: Path) -> bool:
    """Whether the process that was last started for a folder lives."""
    started = read_json(folder / "starting.json")
    return started is not None and is_process(started["pid"], started["started"])


async def ensure_agent(folder: Path, worker: object, interface: str, num_slots: int | None) -> dict[str, Any]:
    """The agent of a folder: the one that lives or is coming up, else a new one. Raises WorldError when it ends."""
    if living_agent(folder) is None and not is_coming_up(folder):
        start_agent(folder, worker, interface, num_slots)
    async with asyncio.timeout(START_TIMEOUT_S):
        while (known := living_agent(folder)) is None:
            if not is_coming_up(folder):
                tail = log_tail(folder / "agent.log")
                raise WorldError(f"the node agent of worker {worker} ended at its start:\n{tail}")
            await asyncio.sleep(0.02)
    return known


def start_agent(folder: Path, worker: object, interface: str, num_slots: int | None) -> None:
    """Start the agent of a folder, in a session of its own."""
    (folder / "agent.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "jupyter_llmcloud.agent", "--folder", str(folder), "--name", str(worker)]
    command += ["--interface", interface, "--first-lease", str(START_TIMEOUT_S), "--stays", str(STAYS_S)]
    if num_slots is not None:
        command += ["--slots", str(num_slots)]
    process = spawn(command, folder / "agent.log")
    starting = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    write_json(folder / "starting.json", starting, durable=False)  # of a process, which no loss of power outlives


def start_ahead(cluster_id: str, num_workers: int, num_slots: int | None = None) -> None:
    """Start the agents of a local cluster that is about to start, but for those that are there already."""
    for worker in range(num_workers):
        folder = agent_folder(cluster_id, worker)
        if living_agent(folder) is None and not is_coming_up(folder):
            start_agent(folder, worker, "127.0.0.1", num_slots)


def end_agents(cluster_id: str) -> None:
    """End the agents of a cluster that has not come up."""
    for path in cluster_folder(cluster_id).glob("a*/starting.json"):
        starting = read_json(path)
        if starting and is_process(starting["pid"], starting["started"]):
            os.kill(starting["pid"], signal.SIGTERM)
