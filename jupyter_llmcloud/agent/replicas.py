"""Replicas on this host: one process each, started by module name, ended with the agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_llmcloud.agent.ranks.devices import Devices
from jupyter_llmcloud.agent.resources import Ours
from jupyter_llmcloud.errors import NameTaken, NotFound
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
            "log": str(self.log),
        }


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
        spec = {"socket": str(path), "device": self._device(replica_id), **spec}
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
        replica.watch = asyncio.create_task(self._watch(replica))
        self._replicas[replica_id] = replica
        return replica.describe()

    def _device(self, replica_id: str) -> str:
        if not self.devices.has_gpus:
            return "cpu"
        slot = self.devices.take(f"replica {replica_id}", 1)[0]
        return f"cuda:{self.devices.gpus.index(slot)}"

    async def _watch(self, replica: ReplicaProcess) -> int:
        code = await replica.process.wait()
        self.devices.give_back(f"replica {replica.replica_id}")
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
                    device=int(replica.device.partition(":")[2]) if ":" in replica.device else None,
                )

    async def close(self) -> None:
        """End them all."""
        await asyncio.gather(*(self.stop(name) for name in list(self._replicas)), return_exceptions=True)
