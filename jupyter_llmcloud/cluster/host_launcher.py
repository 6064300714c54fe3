"""The host processes of clusters, from the side of the server that starts, asks and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import psutil

from jupyter_llmcloud.cluster import agent_launcher
from jupyter_llmcloud.cluster.factory import starts_here
from jupyter_llmcloud.cluster.record import ClusterRecord, read_record
from jupyter_llmcloud.errors import ConnectionLost, UsageError, WorldError
from jupyter_llmcloud.protocol.agent_messages import StopCluster
from jupyter_llmcloud.protocol.client import AgentConnection
from jupyter_llmcloud.protocol.rpc import Request
from jupyter_llmcloud.system.processes import is_process
from jupyter_llmcloud.system.spawn import log_tail, spawn

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 40.0


class HostProcesses:
    """Starts `python -m jupyter_llmcloud.cluster.host` in sessions of their own."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    async def start(self, record: ClusterRecord) -> ClusterRecord:
        """Start the host process of a cluster; returns its record once it runs. Raises UsageError, WorldError."""
        if starts_here(record.kind, record.options):
            agent_launcher.start_ahead(record.cluster_id, record.workers or 1, record.options.get("slots"))
        log = record.folder / "host.log"
        process = self._processes[record.cluster_id] = spawn(
            [sys.executable, "-m", "jupyter_llmcloud.cluster.host"], log, takes_input=True
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"record": asdict(record), "lease_s": self.lease_s}).encode() + b"\n")
        process.stdin.close()
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                known = read_record(record.folder)
                if known is not None and known.state == "running":
                    return known
                if known is not None and known.state == "failed":
                    raise UsageError(f"the cluster {record.name!r} did not start: {known.reason}")
                if process.poll() is not None:
                    tail = log_tail(log)
                    raise WorldError(f"the host process of cluster {record.name!r} ended at its start:\n{tail}")
                await asyncio.sleep(0.02)

    async def ask(self, record: ClusterRecord, request: Request[Any], timeout_s: float = 10.0) -> None:
        """Send a request to a host process; a refusal is raised."""
        async with await AgentConnection.open(record.control) as connection:
            await connection.request(request, timeout_s)

    async def stop(self, record: ClusterRecord) -> None:
        """End a cluster with all that runs on it, and wait until it has."""
        try:
            await self.ask(record, StopCluster())
        except ConnectionLost:  # its socket has gone, by a clean-up of the temporary folder for instance
            if is_process(record.pid, record.pid_started):
                os.kill(record.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while is_process(record.pid, record.pid_started):
            self._reap(record)
            if time.monotonic() > deadline:
                with contextlib.suppress(psutil.Error):
                    psutil.Process(record.pid).kill()
                return
            await asyncio.sleep(0.02)

    def abandon(self, record: ClusterRecord) -> None:
        """End a host process that has not come up."""
        process = self._processes.pop(record.cluster_id, None)
        if process is not None and process.poll() is None:
            process.terminate()
        agent_launcher.end_agents(record.cluster_id)

    def forget(self, record: ClusterRecord) -> None:
        """The host process has ended."""
        self._reap(record)
        self._processes.pop(record.cluster_id, None)

    def _reap(self, record: ClusterRecord) -> None:
        if process := self._processes.get(record.cluster_id):
            process.poll()
