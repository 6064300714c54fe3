"""Replicas on this host: one process each, started by module name, ended with the agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from jupyter_llmcloud.agent.memory_limit import MemoryLimit
from jupyter_llmcloud.agent.ranks.devices import Devices
from jupyter_llmcloud.agent.resources import Ours
from jupyter_llmcloud.core.scheduling.replica_room import REPLICA
from jupyter_llmcloud.errors import Busy, NameTaken, NotFound
from jupyter_llmcloud.system.spawn import open_log

STOP_GRACE_S = 5.0


@dataclass
class ReplicaProcess:
    """One process that serves a revision of an endpoint."""

    replica_id: str
    endpoint: str
    process: asyncio.subprocess.Process
    socket: Path
    log: Path
    device: str
    cores: int = 0
    memory_bytes: int = 0
    limit: MemoryLimit | None = None
    watch: asyncio.Task[int] | None = field(default=None, repr=False)

    def describe(self) -> dict[str, Any]:
        code = self.process.returncode
        return {
            "replica_id": self.replica_id,
            "endpoint": self.endpoint,
            "pid": self.process.pid,
            "socket": str(self.socket),
            "state": "running" if code is None else "exited",
            "exit_code": code,
            "reason": self.limit.reason if self.limit is not None else "",
            "log": str(self.log),
        }


def _resident(pid: int) -> int:
    """Bytes that a process has taken."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


class Replicas:
    """The replicas of an agent. A replica ends when its standard input closes, so none outlives the agent."""

    def __init__(self, folder: Path, devices: Devices) -> None:
        self.folder = folder
        self.devices = devices
        self._replicas: dict[str, ReplicaProcess] = {}

    async def start(self, endpoint: str, replica_id: str, spec: dict[str, Any]) -> dict[str, Any]:
        """Start `python -m jupyter_llmcloud.inference` and hand it `spec`; returns its description at once."""
        if (known := self._replicas.get(replica_id)) and known.process.returncode is None:
            raise NameTaken(f"replica {replica_id!r} runs already.")
        path = self.folder / f"{replica_id}.sock"
        log_path = self.folder / f"{replica_id}.log"
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        cores, memory = int(spec.get("cores") or 0), int(spec.get("memory_bytes") or 0)
        spec = {**spec, "socket": spec.get("socket", str(path))}
        spec["device"] = spec.get("device") or self._take(replica_id, cores, spec.get("devices"))
        with open_log(log_path) as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "jupyter_llmcloud.inference",
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        assert process.stdin is not None
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        replica = ReplicaProcess(replica_id, endpoint, process, Path(spec["socket"]), log_path, str(spec["device"]))
        replica.cores, replica.memory_bytes = cores, memory
        if memory:
            replica.limit = MemoryLimit(replica_id, memory)
        replica.watch = asyncio.create_task(self._watch(replica))
        self._replicas[replica_id] = replica
        return replica.describe()

    def _take(self, replica_id: str, cores: int, num_devices: int | None) -> str:
        """Take what it was promised, in slots: GPUs, or one for each core. Raises Busy.

        Returns:
            "cpu", "cuda:0", or "cuda:0,1" for a replica that is spread over several.
        """
        if self.devices.has_gpus and num_devices != 0:
            slots = self.devices.take(f"{REPLICA}{replica_id}", num_devices or 1)
            return "cuda:" + ",".join(str(self.devices.gpus.index(slot)) for slot in slots)
        reserved = self.describe_room()["reserved_cores"]
        if cores + reserved > self.devices.cores:
            raise Busy(f"--cores {cores}: {reserved} of {self.devices.cores} cores are other replicas'.")
        if cores and not self.devices.has_gpus:
            self.devices.take(f"{REPLICA}{replica_id}", cores)
        return "cpu"

    def describe_room(self) -> dict[str, Any]:
        """For the description of the agent: cores and memory of its host, and what was promised of them."""
        running = [one for one in self._replicas.values() if one.process.returncode is None]
        return {
            "num_cores": self.devices.cores,
            "reserved_cores": sum(one.cores for one in running),
            "free_memory_bytes": psutil.virtual_memory().available,
            "promised_bytes": sum(max(0, one.memory_bytes - _resident(one.process.pid)) for one in running),
        }

    async def _watch(self, replica: ReplicaProcess) -> int:
        keeping = asyncio.create_task(replica.limit.keep(replica.process.pid)) if replica.limit is not None else None
        code = await replica.process.wait()
        if replica.limit is not None and keeping is not None:
            keeping.cancel()
            replica.limit.ended()
            if replica.limit.reason:
                with open_log(replica.log) as log:
                    os.write(log, f"{replica.limit.reason}\n".encode())
        self.devices.give_back(f"{REPLICA}{replica.replica_id}")
        with contextlib.suppress(FileNotFoundError):
            replica.socket.unlink()
        return code

    async def stop(self, replica_id: str) -> None:
        """SIGTERM, then SIGKILL; returns when it has gone."""
        replica = self._replicas.pop(replica_id, None)
        if replica is None:
            raise NotFound(f"there is no replica {replica_id!r} on this worker.")
        assert replica.watch is not None
        with contextlib.suppress(ProcessLookupError):
            replica.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.shield(replica.watch), STOP_GRACE_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                replica.process.kill()
            await replica.watch

    @property
    def num_running(self) -> int:
        return sum(1 for replica in self._replicas.values() if replica.process.returncode is None)

    def describe(self) -> list[dict[str, Any]]:
        """Every replica started here and not stopped on request."""
        return [replica.describe() for replica in self._replicas.values()]

    def processes(self) -> Iterator[Ours]:
        """Their processes."""
        for replica in self._replicas.values():
            if replica.process.returncode is None:
                yield Ours(
                    pid=replica.process.pid,
                    kind="replica",
                    endpoint=replica.endpoint,
                    replica_id=replica.replica_id,
                    device=int(replica.device.partition(":")[2].split(",")[0]) if ":" in replica.device else None,
                )

    async def close(self) -> None:
        """End them all."""
        await asyncio.gather(*(self.stop(name) for name in list(self._replicas)), return_exceptions=True)
