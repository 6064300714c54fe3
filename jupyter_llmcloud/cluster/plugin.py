"""The worker plugin: starts the node agent of a worker, or adopts the one that outlived the worker before it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from distributed import Status, Worker, WorkerPlugin
from distributed.comm.core import Comm

from jupyter_llmcloud.agent.client import AgentConnection
from jupyter_llmcloud.cluster.bridge import TUNNEL, Bridge, answer_tunnel
from jupyter_llmcloud.cluster.record import cluster_folder, is_process
from jupyter_llmcloud.core.messages import RenewLease
from jupyter_llmcloud.errors import WorldError

START_TIMEOUT_S = 60.0
PLUGIN_NAME = "llmcloud-agent"


class AgentPlugin(WorkerPlugin):
    """One agent per worker, in a session of its own: it outlives the worker.

    Args:
        cluster_id: names the folder of the agent's socket.
        num_slots: slots on a host without GPUs (default: its cores, at least 8).
    """

    name = PLUGIN_NAME
    idempotent = True

    def __init__(self, cluster_id: str, num_slots: int | None = None) -> None:
        self.cluster_id = cluster_id
        self.num_slots = num_slots
        self.info: dict[str, Any] = {}
        self._connection: AgentConnection | None = None
        self._folder = Path()
        self._bridges: list[Bridge] = []

    async def setup(self, worker: Worker) -> None:
        """Called by Dask when the worker starts."""
        folder = cluster_folder(self.cluster_id) / ("a" + re.sub(r"[^\w.-]", "_", str(worker.name))[-24:])
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._is_alive(folder):
            await self._start(folder, worker)
        self.info = {**json.loads((folder / "agent.json").read_text()), "worker": worker.address}
        self._folder = folder
        worker.handlers[TUNNEL] = self._answer_tunnel
        self._connection = await AgentConnection.open(self.info["address"])
        await self._connection.request(RenewLease())  # held for as long as this connection is open

    def _is_alive(self, folder: Path) -> bool:
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads((folder / "agent.json").read_text())
            return is_process(known["pid"], known["started"])
        return False

    async def _start(self, folder: Path, worker: Worker) -> None:
        with contextlib.suppress(FileNotFoundError):
            (folder / "agent.json").unlink()
        command = [
            sys.executable,
            "-m",
            "jupyter_llmcloud.agent",
            "--folder",
            str(folder),
            "--name",
            str(worker.name),
        ]
        command += ["--interface", urlparse(worker.address).hostname or "127.0.0.1"]
        if self.num_slots is not None:
            command += ["--slots", str(self.num_slots)]
        log = os.open(folder / "agent.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        finally:
            os.close(log)
        async with asyncio.timeout(START_TIMEOUT_S):
            while not (folder / "agent.json").exists():
                if process.poll() is not None:
                    words = (folder / "agent.log").read_text(errors="replace")[-2000:]
                    raise WorldError(f"the node agent of worker {worker.name} ended at its start:\n{words}")
                await asyncio.sleep(0.02)

    async def _answer_tunnel(self, comm: Comm, target: str) -> Status:
        return await answer_tunnel(comm, self._folder, target)

    async def bridge_to(self, worker: Worker, target_worker: str, target: str) -> str:
        """A socket on this worker's host that stands for another host's agent."""
        bridge = Bridge(self._folder, target_worker, target, worker.security.get_connection_args("worker"))
        self._bridges.append(bridge)
        return await bridge.start()

    async def teardown(self, worker: Worker) -> None:
        """The worker ends, the agent stays for its lease: the next worker of that name adopts it."""
        for bridge in self._bridges:
            bridge.close()
        if self._connection is not None:
            await self._connection.close()


async def open_bridge(target_worker: str, target: str, dask_worker: Worker) -> str:
    """Run on a worker: have a socket there that stands for the agent beside another worker; returns its path."""
    plugin = dask_worker.plugins[PLUGIN_NAME]
    assert isinstance(plugin, AgentPlugin)
    return await plugin.bridge_to(dask_worker, target_worker, target)


def agent_info(dask_worker: Worker) -> dict[str, Any]:
    """Run on a worker: what its agent said of itself."""
    plugin = dask_worker.plugins[PLUGIN_NAME]
    assert isinstance(plugin, AgentPlugin)
    return plugin.info
