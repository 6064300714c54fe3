"""One endpoint while it lives: a task per replica that starts it, waits until it is ready, replaces it when it dies."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError, ModelError, NotFound, UsageError
from jupyter_llmcloud.protocol.agent_messages import DescribeReplicas, StartReplica, StopReplica
from jupyter_llmcloud.server.endpoints.replica_client import MAX_CONCURRENT, ReplicaClient
from jupyter_llmcloud.server.gateway.admission import Admission
from jupyter_llmcloud.storage.server_state import StoredEndpoint

if TYPE_CHECKING:
    from jupyter_llmcloud.server.context import ServerContext

ACTIVE_STATES = ("starting", "ready")
PROBE_EVERY_S = 2.0
LOADING_POLL_S = 0.1
LOADING_TIMEOUT_S = 900.0
MAX_SILENT_PROBES = 3
MAX_FAILED_STARTS = 8
MAX_BACK_OFF_S = 30.0
START_TIMEOUT_S = 60.0


class ReplicaLost(Exception):
    """A replica has gone, or cannot be started just now; another may be started."""


class LiveEndpoint:
    """An endpoint and its replicas. Every change of state is saved and told to those who wait for it."""

    def __init__(self, stored: StoredEndpoint, context: ServerContext) -> None:
        self.stored = stored
        self._context = context
        self._replicas: dict[str, ReplicaClient] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._suspicious = asyncio.Event()
        self.admission = Admission(self.ready_replicas)

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def is_active(self) -> bool:
        return self.stored.state in ACTIVE_STATES

    def ready_replicas(self) -> list[ReplicaClient]:
        """Those that can be asked."""
        return [replica for replica in self._replicas.values() if replica.state == "ready"]

    def describe(self) -> dict[str, Any]:
        """What the API tells of it: neither sockets nor tokens."""
        kept = (
            "name",
            "state",
            "model",
            "target",
            "revision",
            "created",
            "reason",
            "dtype",
            "cluster",
            "num_replicas",
        )
        replicas = [replica.describe() for replica in self._replicas.values()]
        return {**{key: getattr(self.stored, key) for key in kept}, "replicas": replicas}

    def logs(self) -> list[str]:
        """Where its replicas keep their output, the newest last."""
        return [replica["log"] for replica in self.stored.replicas if replica.get("log")]

    def open(self, inherited: bool = False) -> None:
        """Begin to keep its replicas; `inherited` ones may live still and are found again."""
        before = [ReplicaClient.from_stored(row) for row in self.stored.replicas] if inherited else []
        self._set_state("starting")
        for number in range(self.stored.num_replicas):
            replica = before[number] if number < len(before) else None
            self._tasks.append(asyncio.ensure_future(self._keep_or_fail(replica)))

    async def wait(self, state: str, timeout_s: float) -> None:
        """Wait until its state is another than `state`, or the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.stored.state == state:
                    await self._changed.wait()
        except TimeoutError:
            return

    def suspect(self, replica: ReplicaClient) -> None:
        """A request could not reach this replica: ask it no more until a probe has."""
        if replica.state == "ready":
            replica.state = "suspect"
        self._suspicious.set()

    async def detach(self) -> None:
        """The server ends and the replicas go on: the next server finds them by what is saved."""
        self._save()
        await self._cancel()
        await asyncio.gather(*(replica.close() for replica in self._replicas.values()))

    async def stop(self) -> None:
        """End every replica."""
        self._set_state("stopped")
        await self._cancel()
        await asyncio.gather(*(self._end(replica) for replica in list(self._replicas.values())))

    async def _cancel(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- one replica after another ---

    async def _keep_or_fail(self, replica: ReplicaClient | None) -> None:
        try:
            await self._keep(replica)
        except Exception as error:  # a mistake of ours must show on the endpoint, not die with its task
            self._context.log.exception("endpoint %s", self.name)
            await self._fail(f"{type(error).__name__}: {error}")

    async def _keep(self, replica: ReplicaClient | None) -> None:
        num_failed = 0
        while self.is_active:
            try:
                replica = replica or await self._start()
                self._replicas[replica.id] = replica
                await self._until_ready(replica)
                num_failed = 0
                await self._until_lost(replica)
            except (ModelError, NotFound, UsageError) as error:
                await self._fail(str(error))
            except (ReplicaLost, LLMCloudError) as error:
                num_failed += 1
                self._context.log.warning("endpoint %s: %s", self.name, error)
                await self._lose(replica, str(error))
                if num_failed >= MAX_FAILED_STARTS:
                    await self._fail(f"{MAX_FAILED_STARTS} starts failed, the last one: {error}")
                elif num_failed > 1:
                    await asyncio.sleep(min(MAX_BACK_OFF_S, 0.5 * 2**num_failed))
            replica = None

    async def _start(self) -> ReplicaClient:
        pool = await self._context.pool()
        cluster, agent = await pool.agent_for_replica(self.stored.cluster)
        replica = ReplicaClient(
            id=f"{self.name[:40]}-{secrets.token_hex(4)}",
            agent=agent.address,
            token=secrets.token_urlsafe(32),
        )
        spec = {
            "endpoint": self.name, "served_name": self.name, "model": self.stored.model, "dtype": self.stored.dtype,
            "token": replica.token, "max_concurrent": MAX_CONCURRENT, "num_threads": None,
        }  # fmt: skip
        self._replicas[replica.id] = replica  # known before it runs, so that whoever stops now ends it too
        async with await self._context.open_agent(agent.address) as connection:
            message = StartReplica(endpoint=self.name, replica_id=replica.id, spec=spec)
            started = await connection.request(message, timeout_s=START_TIMEOUT_S)
        replica.pid, replica.log = started.pid, started.log
        replica.socket = await pool.reach_replica(cluster, agent, started.socket)
        self._save()
        return replica

    async def _until_ready(self, replica: ReplicaClient) -> None:
        deadline = asyncio.get_running_loop().time() + LOADING_TIMEOUT_S
        while (health := await replica.health()).state != "ready":
            if health.state == "failed":
                raise ModelError(f"the model could not be loaded: {health.reason or 'its log tells more'}.")
            if health.state == "unreachable":
                await self._check_alive(replica)
            if asyncio.get_running_loop().time() > deadline:
                raise ReplicaLost(f"replica {replica.id} was not ready within {LOADING_TIMEOUT_S:.0f} s")
            await asyncio.sleep(LOADING_POLL_S)
        replica.state = "ready"
        replica.max_concurrent = int(health.values.get("max_concurrent") or replica.max_concurrent)
        self._set_state("ready")
        self.admission.admit()

    async def _until_lost(self, replica: ReplicaClient) -> None:
        num_silent = 0
        while True:
            await self._next_probe()
            health = await replica.health()
            num_silent = num_silent + 1 if health.state == "silent" else 0
            if health.state == "ready":
                if replica.state == "suspect":
                    replica.state = "ready"
                    self.admission.admit()
            elif health.state != "silent" or num_silent >= MAX_SILENT_PROBES:
                raise ReplicaLost(f"replica {replica.id} (pid {replica.pid}) is gone: {health.reason or health.state}")

    async def _next_probe(self) -> None:
        try:
            async with asyncio.timeout(PROBE_EVERY_S):
                await self._suspicious.wait()
        except TimeoutError:
            return
        self._suspicious.clear()

    async def _check_alive(self, replica: ReplicaClient) -> None:
        """Its socket does not answer yet: is there still a process that will?"""
        try:
            async with await self._context.open_agent(replica.agent) as connection:
                replicas = (await connection.request(DescribeReplicas())).replicas
        except ConnectionLost as error:
            raise ReplicaLost(f"replica {replica.id}: {error}") from None
        told = next((row for row in replicas if row["replica_id"] == replica.id), None)
        if told is None:
            raise ReplicaLost(f"replica {replica.id} is not known to its agent any more")
        if (code := told.get("exit_code")) is not None:
            ending = f"replica {replica.id} ended with {code} before it was ready"
            if code > 0:  # it decided to end, and would do so again
                raise ModelError(f"{ending}: {await asyncio.to_thread(last_line, replica.log)}")
            raise ReplicaLost(f"{ending}. Its log: {replica.log}")
        if told["socket"] != replica.socket:
            replica.pid, replica.socket, replica.log = told["pid"], told["socket"], told.get("log", "")
            await replica.close()
            self._save()

    async def _lose(self, replica: ReplicaClient | None, reason: str) -> None:
        if replica is not None:
            replica.state = "gone"
            await self._end(replica)
        if self.is_active and not self.ready_replicas():
            self._set_state("starting", reason)
        self.admission.admit()

    async def _end(self, replica: ReplicaClient) -> None:
        self._replicas.pop(replica.id, None)
        await replica.close()
        try:
            async with await self._context.open_agent(replica.agent) as connection:
                await connection.request(StopReplica(replica_id=replica.id))
        except LLMCloudError as error:
            self._context.log.debug("replica %s was gone already: %s", replica.id, error)

    async def _fail(self, reason: str) -> None:
        self._set_state("failed", reason)
        current = asyncio.current_task()
        others = [task for task in self._tasks if task is not current]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*(self._end(replica) for replica in list(self._replicas.values())))

    # --- telling it ---

    def _set_state(self, state: str, reason: str = "") -> None:
        changed = (self.stored.state, self.stored.reason) != (state, reason)
        self.stored.state, self.stored.reason = state, reason
        self._save()
        if changed:
            self._context.audit.tell("server", "endpoint.state", self.name, state=state, reason=reason)
        self._changed.set()
        self._changed = asyncio.Event()

    def _save(self) -> None:
        living = [replica.to_stored() for replica in self._replicas.values()]
        if living:
            self.stored.replicas = living
        self._context.state.save_endpoint(self._context.server_id, self.stored)


def last_line(log: str) -> str:
    """What a process said last."""
    try:
        data = Path(log).read_bytes()[-4096:].decode(errors="replace")
    except OSError:
        return "its log cannot be read here"
    lines = [line for line in data.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "its log is empty"
