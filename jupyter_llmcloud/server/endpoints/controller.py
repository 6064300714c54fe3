"""One endpoint while it lives: carries out what its plan says, and tells the plan what is observed.

What is decided is decided in `core.serving.endpoint_plan`, in one task, event after event. An instruction that takes
time (a start, a probe, an end) is an operation beside that task; how it ended is the next event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.serving.endpoint_plan import (
    AskAgent,
    Desired,
    Drain,
    EndpointPlan,
    Event,
    Idle,
    Instruction,
    Lost,
    MarkState,
    Probe,
    Probed,
    ProcessAlive,
    Resumed,
    Revision,
    Route,
    Started,
    StartReplica,
    Stopped,
    StopReplica,
    Suspected,
    Tick,
    Timing,
)
from jupyter_llmcloud.core.serving.rates import RateWindow
from jupyter_llmcloud.errors import LLMCloudError, ModelError, NotFound, UsageError
from jupyter_llmcloud.server.endpoints.replica_client import ReplicaClient
from jupyter_llmcloud.server.endpoints.replica_host import ReplicaGone
from jupyter_llmcloud.server.gateway.admission import AdmissionControl
from jupyter_llmcloud.storage.server_state import StoredEndpoint, StoredReplica

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.endpoints.records import EndpointRecords
    from jupyter_llmcloud.server.endpoints.replica_host import ReplicaHost

PROBE_TIMEOUT_S = Timing().probe_timeout_s
ACTIVE_STATES = ("starting", "ready")
_TOLD = (
    "model",
    "target",
    "dtype",
    "engine",
    "num_replicas",
    "base_model",
    "max_model_len",
    "max_concurrent",
    "threads",
)
_REPORTED_BY_REPLICAS = ("engine", "num_parallel", "num_threads", "context_length", "memory")


class EndpointController:
    """An endpoint and its replicas. Every change of state is saved and told to those who wait for it.

    Attributes:
        stored: what is kept of it.
        admission: the door through which requests come to its replicas.
    """

    def __init__(self, stored: StoredEndpoint, host: ReplicaHost, records: EndpointRecords, log: Logger) -> None:
        self.stored = stored
        self._host = host
        self._records = records
        self._log = log
        self._plan = EndpointPlan(was_ready=stored.state == "ready")
        self._replicas: dict[int, ReplicaClient] = {}
        self._routed: list[ReplicaClient] = []
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._operations: dict[tuple[int, str], asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.admission = AdmissionControl(self.ready_replicas, lambda: self._plan.may_recover)

    @cached_property
    def rates(self) -> RateWindow:
        """What went through it of late."""
        return RateWindow()

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def state(self) -> str:
        """starting, ready, failed or stopped."""
        return self.stored.state

    @property
    def reason(self) -> str:
        """Why it is in that state, when there is more to say."""
        return self.stored.reason

    @property
    def is_active(self) -> bool:
        """It answers, or will."""
        return self.state in ACTIVE_STATES

    def ready_replicas(self) -> list[ReplicaClient]:
        """Those that can be asked."""
        return list(self._routed)

    def describe(self) -> dict[str, Any]:
        """What the API tells of it: neither sockets nor tokens."""
        stored, current = self.stored, self.stored.current
        kept = {key: getattr(stored, key) for key in ("name", "state", "created", "reason", "cluster")}
        served = {key: getattr(current, key) for key in _TOLD}
        states = self._plan.states()
        replicas = [
            {
                "id": replica.id, "pid": replica.pid, "state": states.get(number, ""),
                "in_flight": replica.num_in_flight,
                **{key: value for key, value in replica.reported.items() if key in _REPORTED_BY_REPLICAS},
            }
            for number, replica in self._replicas.items()
            if replica.id
        ]  # fmt: skip
        rates = {
            **self.rates.rates(time.time()),
            "num_queued": self.admission.num_waiting,
            "num_in_flight": sum(replica.num_in_flight for replica in self._replicas.values()),
        }
        return {**kept, **served, "revision": current.fingerprint, "replicas": replicas, "rates": rates}

    def logs(self) -> list[str]:
        """Where its replicas keep their output, the newest last."""
        return [replica.log for replica in self.stored.replicas if replica.log]

    # --- what is asked of it ---

    def open(self, inherited: bool = False) -> None:
        """Begin to keep its replicas; `inherited` ones may live still and are looked for."""
        before = self.stored.replicas if inherited else []
        self._replicas = {number: ReplicaClient(number, stored) for number, stored in enumerate(before, 1)}
        self.stored.state, self.stored.reason = "starting", ""
        self._save()
        revisions = tuple(revision for revision in self.stored.revisions if revision.num_replicas)
        found = {number: replica.stored.revision for number, replica in self._replicas.items()}
        self._inbox.put_nowait(Resumed(revisions, found))
        self._task = asyncio.ensure_future(self._reconcile())

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
        if replica in self._routed:
            self._routed.remove(replica)
        self._inbox.put_nowait(Suspected(replica.number))

    async def stop(self) -> None:
        """End every replica; returns when nothing is left of them."""
        self._inbox.put_nowait(Desired())
        await self.ended()

    async def ended(self) -> None:
        """Wait until nothing is left of an endpoint that is stopped or has failed."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def detach(self) -> None:
        """The server ends and the replicas go on: the next server finds them by what is saved."""
        self._save()
        tasks = [*self._operations.values(), *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in self._replicas.values()))

    # --- the one task of an endpoint ---

    async def _reconcile(self) -> None:
        try:
            while not self._plan.is_over:
                event = await self._next_event()
                for instruction in self._plan.handle(event, self._now()):
                    self._carry_out(instruction)
                if isinstance(event, Started | ProcessAlive | Stopped):
                    self._save()
        except Exception as error:  # a mistake of ours must show on the endpoint, not die with its task
            self._log.exception("endpoint %s", self.name)
            self._mark("failed", f"{type(error).__name__}: {error}")
            await asyncio.gather(*(self._end(replica) for replica in list(self._replicas.values())))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _next_event(self) -> Event:
        """What is observed next; a Tick when the plan wants to be asked again before that."""
        if self._plan.wake_at is None:
            return await self._inbox.get()
        try:
            async with asyncio.timeout_at(self._plan.wake_at):
                return await self._inbox.get()
        except TimeoutError:
            return Tick()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case StartReplica(number, revision):
                self._replicas[number] = ReplicaClient(number, StoredReplica(id=""))
                self._operate("start", number, partial(self._start, revision=revision))
            case Probe(number):
                self._operate("probe", number, self._probe)
            case AskAgent(number):
                self._operate("find", number, self._find)
            case Drain(number):
                self._operate("drain", number, self._drain)
            case StopReplica(number, reason):
                replica = self._replicas[number]
                replica.give_up(f"{replica}: {reason}" if replica.id and replica.id not in reason else reason)
                self._operate("stop", number, self._stop)
            case Route(weights):
                self._routed = [self._replicas[number] for number in weights]
                self.admission.admit()
            case MarkState(state, reason):
                self._mark(state, reason)

    def _operate(self, kind: str, number: int, work: Callable[[ReplicaClient], Awaitable[Event]]) -> None:
        async def operate() -> None:
            try:
                event = await work(self._replicas[number])
            except Exception as error:  # a mistake of ours
                self._log.exception("endpoint %s: %s of replica %s", self.name, kind, number)
                why = f"{type(error).__name__}: {error}"
                event = Stopped(number) if kind == "stop" else Lost(number, why, lasting=True)
            finally:
                self._operations.pop((number, kind), None)
            self._inbox.put_nowait(event)

        self._operations[number, kind] = asyncio.ensure_future(operate())

    # --- operations: each ends with an event ---

    async def _start(self, replica: ReplicaClient, revision: Revision) -> Event:
        try:
            placed = await self._host.place(self.name, revision, self.stored.cluster)
            replica.stored = placed.replica  # known before it runs, so that whoever stops now ends it too
            self._save()
            replica.stored = await self._host.start(self.name, revision, placed)
        except (ModelError, NotFound, UsageError) as error:
            return Lost(replica.number, str(error), lasting=True)
        except (ReplicaGone, LLMCloudError) as error:
            self._log.warning("endpoint %s: %s", self.name, error)
            return Lost(replica.number, str(error))
        return Started(replica.number)

    async def _probe(self, replica: ReplicaClient) -> Event:
        health = await replica.health(PROBE_TIMEOUT_S)
        if health.state == "ready":
            replica.max_concurrent = int(health.values.get("max_concurrent") or replica.max_concurrent)
            replica.reported = health.values
            return Probed(replica.number, "ready")
        if health.state == "failed":
            return Probed(replica.number, "failed", health.reason)
        if health.state == "silent":
            self._log.warning("endpoint %s: %s: %s", self.name, replica, health.reason)
        return Probed(replica.number, health.state, f"{replica}: {health.reason or f'it says: {health.state}'}")

    async def _find(self, replica: ReplicaClient) -> Event:
        try:
            found = await self._host.find(replica.stored)
        except ReplicaGone as error:
            return Lost(replica.number, str(error), error.lasting)
        except LLMCloudError as error:
            return Lost(replica.number, f"{replica}: {error}")
        if found != replica.stored:
            replica.stored = found
            await replica.close()
        return ProcessAlive(replica.number)

    async def _drain(self, replica: ReplicaClient) -> Event:
        await replica.wait_idle()
        return Idle(replica.number)

    async def _stop(self, replica: ReplicaClient) -> Event:
        await self._end_operations(replica)
        await self._end(replica)
        return Stopped(replica.number)

    async def _end_operations(self, replica: ReplicaClient) -> None:
        """What else is done with it: a start that has reached the agent is waited for, or it would be overtaken."""
        others = {kind: task for (n, kind), task in self._operations.items() if n == replica.number and kind != "stop"}
        for kind, task in others.items():
            if kind != "start" or not replica.stored.agent:
                task.cancel()
        if others:
            await asyncio.wait(others.values())

    async def _end(self, replica: ReplicaClient) -> None:
        await replica.close()
        if replica.stored.agent:
            try:
                await self._host.stop(replica.stored)
            except LLMCloudError as error:
                self._log.warning("endpoint %s: %s may live on: %s", self.name, replica, error)
        self._replicas.pop(replica.number, None)

    # --- telling it ---

    def _mark(self, state: str, reason: str) -> None:
        self.stored.state, self.stored.reason = state, reason
        self._save()
        self._records.tell(self.name, state, reason)
        self.admission.admit()
        self._changed.set()
        self._changed = asyncio.Event()

    def _save(self) -> None:
        if living := [replica.stored for replica in self._replicas.values() if replica.id]:
            self.stored.replicas = living
        self._records.save(self.stored)
