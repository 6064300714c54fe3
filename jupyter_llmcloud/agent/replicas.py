"""Replicas on this host: one process each, started by module name, ended with the agent.

Those that only our own engines run in are forked from the zygote, where torch and transformers are imported already:
such a replica is there seconds sooner. The others run code of a user, or another server: they start from nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from jupyter_llmcloud.agent.memory_limit import MemoryLimit
from jupyter_llmcloud.agent.ranks.devices import Devices
from jupyter_llmcloud.agent.ranks.zygote_client import ZygoteClient
from jupyter_llmcloud.agent.resources import Ours
from jupyter_llmcloud.core.scheduling.replica_room import REPLICA
from jupyter_llmcloud.core.serving.models.engine_names import is_external
from jupyter_llmcloud.errors import Busy, NameTaken, NotFound, WorldError
from jupyter_llmcloud.protocol.rank_messages import ForkProgram
from jupyter_llmcloud.system.spawn import open_log

STOP_GRACE_S = 5.0
MODULE = "jupyter_llmcloud.inference"
log = logging.getLogger(__name__)


class ChildProcess(Protocol):
    """One that this agent has started, or had forked."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    async def wait(self) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


@dataclass
class ReplicaProcess:
    """One process that serves a revision of an endpoint."""

    replica_id: str
    endpoint: str
    process: ChildProcess
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


def is_ours_alone(spec: dict[str, Any]) -> bool:
    """Whether nothing but our own engines, torch and transformers will run in a replica."""
    return not spec.get("source") and not is_external(str(spec.get("engine") or "auto"))


def _write(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended already, which is seen elsewhere
        while data:
            data = data[os.write(descriptor, data) :]


class Replicas:
    """The replicas of an agent. A replica ends when its standard input closes, so none outlives the agent."""

    def __init__(self, folder: Path, devices: Devices, zygote: ZygoteClient) -> None:
        self.folder = folder
        self.devices = devices
        self._zygote = zygote
        self._replicas: dict[str, ReplicaProcess] = {}
        self._starting: dict[str, asyncio.Event] = {}  # set when there is a process, or none will come

    async def start(self, endpoint: str, replica_id: str, spec: dict[str, Any]) -> dict[str, Any]:
        """Start `python -m jupyter_llmcloud.inference` and hand it `spec`; returns its description at once."""
        if replica_id in self._starting:
            raise NameTaken(f"replica {replica_id!r} starts already.")
        begun = self._starting[replica_id] = asyncio.Event()
        try:
            return await self._start(endpoint, replica_id, spec)
        finally:
            del self._starting[replica_id]
            begun.set()

    async def _start(self, endpoint: str, replica_id: str, spec: dict[str, Any]) -> dict[str, Any]:
        if (known := self._replicas.get(replica_id)) and known.process.returncode is None:
            raise NameTaken(f"replica {replica_id!r} runs already.")
        path = self.folder / f"{replica_id}.sock"
        log_path = self.folder / f"{replica_id}.log"
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        cores, memory = int(spec.get("cores") or 0), int(spec.get("memory_bytes") or 0)
        spec = {**spec, "socket": spec.get("socket", str(path))}
        spec["device"] = spec.get("device") or self._take(replica_id, cores, spec.get("devices"))
        process, stdin = await self._begin(replica_id, log_path, is_forked=is_ours_alone(spec))
        replica = ReplicaProcess(replica_id, endpoint, process, Path(spec["socket"]), log_path, str(spec["device"]))
        replica.cores, replica.memory_bytes = cores, memory
        if memory:
            replica.limit = MemoryLimit(replica_id, memory)
        replica.watch = asyncio.create_task(self._watch(replica, stdin))
        self._replicas[replica_id] = replica
        await asyncio.to_thread(_write, stdin, json.dumps(spec).encode() + b"\n")
        return replica.describe()

    async def _begin(self, replica_id: str, log_path: Path, is_forked: bool) -> tuple[ChildProcess, int]:
        """The process, and the end of its standard input that is here."""
        theirs, ours = os.pipe()
        try:
            with open_log(log_path) as output:
                if is_forked:
                    with contextlib.suppress(WorldError):  # of a zygote that cannot be had: its own log tells why
                        request = ForkProgram(name=f"{REPLICA}{replica_id}", module=MODULE, env=dict(os.environ))
                        return await self._zygote.start(request, [theirs, output, output]), ours
                    log.warning("replica %s starts from nothing: %s", replica_id, self._zygote.log)
                command = [sys.executable, "-m", MODULE]
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=theirs, stdout=output, stderr=output, process_group=0
                )
                return process, ours
        except BaseException:
            os.close(ours)
            self.devices.give_back(f"{REPLICA}{replica_id}")
            raise
        finally:
            os.close(theirs)

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

    async def _watch(self, replica: ReplicaProcess, stdin: int) -> int:
        keeping = asyncio.create_task(replica.limit.keep(replica.process.pid)) if replica.limit is not None else None
        try:
            code = await replica.process.wait()
        finally:
            os.close(stdin)
        if replica.limit is not None and keeping is not None:
            keeping.cancel()
            replica.limit.ended()
            if replica.limit.reason:
                with open_log(replica.log) as output:
                    os.write(output, f"{replica.limit.reason}\n".encode())
        self.devices.give_back(f"{REPLICA}{replica.replica_id}")
        with contextlib.suppress(FileNotFoundError):
            replica.socket.unlink()
        return code

    async def stop(self, replica_id: str) -> None:
        """SIGTERM, then SIGKILL; returns when it has gone."""
        if (begun := self._starting.get(replica_id)) is not None:  # whoever asked for it may be gone
            await begun.wait()
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
