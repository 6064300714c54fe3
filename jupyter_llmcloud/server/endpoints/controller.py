"""One endpoint while it lives: carries out what its plan says, and tells the plan what is observed.

What is decided is decided in `core.serving.endpoint.endpoint_plan`, in one task, event after event. An instruction that
takes time (a start, a probe, an end) is an operation beside that task; how it ended is the next event.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.scheduling.priorities import Lender
from jupyter_llmcloud.core.serving.endpoint.endpoint_plan import EndpointPlan, Timing
from jupyter_llmcloud.core.serving.endpoint.plan_messages import (
    AskAgent,
    Desired,
    Drain,
    Event,
    Idle,
    Instruction,
    Lost,
    MarkState,
    NoRoom,
    Probe,
    Probed,
    ProcessAlive,
    Reloaded,
    ReloadReplica,
    Resumed,
    RevisionFailed,
    Route,
    Started,
    StartReplica,
    Stopped,
    StopReplica,
    Suspected,
    Withdraw,
)
from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.core.serving.endpoint.rollout import (
    CANARY,
    RETIRED,
    SHADOW,
    Outcomes,
    expired,
    scaled,
    served,
    why_unhealthy,
    with_role,
)
from jupyter_llmcloud.core.serving.endpoint.rollout import withdrawn as without
from jupyter_llmcloud.core.serving.usage.rates import RateWindow
from jupyter_llmcloud.core.tick import Tick
from jupyter_llmcloud.errors import Busy, CapacityError, LLMCloudError, ModelError, NotFound, UsageError
from jupyter_llmcloud.server.endpoints.replica_client import ReplicaClient, ReplicaLost, ReplicaRefusal
from jupyter_llmcloud.server.endpoints.replica_host import ReplicaGone
from jupyter_llmcloud.server.endpoints.scaling import EVERY_S, Scaling
from jupyter_llmcloud.server.endpoints.shadow import ShadowCopy, ShadowTraffic
from jupyter_llmcloud.server.gateway.admission import AdmissionControl
from jupyter_llmcloud.storage.server_state import StoredEndpoint, StoredReplica

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.endpoints.records import EndpointRecords
    from jupyter_llmcloud.server.endpoints.replica_host import ReplicaHost

PROBE_TIMEOUT_S = Timing().probe_timeout_s
ACTIVE_STATES = ("starting", "ready")
_TOLD = (
    "kind", "model", "target", "dtype", "engine", "num_replicas", "base_model", "max_model_len", "max_concurrent",
    "threads", "cores", "memory_bytes", "cache_bytes", "devices", "min_replicas", "max_replicas", "step",
    "keep_requests", "keep_previous", "priority",
)  # fmt: skip
_OF_A_REVISION = ("number", "role", "weight", "target", "fingerprint", "num_replicas", "step", "note", "was_stable")
GIVES_WAY_S = 5.0  # who waits asks several times a second
MAX_REVISIONS = 20  # that are kept of one endpoint
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
        self._plan = EndpointPlan()
        self._replicas: dict[int, ReplicaClient] = {}
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._operations: dict[tuple[int, str], asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.admission = AdmissionControl(self.ready_replicas, lambda: self._plan.may_recover, self.wake)

    @cached_property
    def scaling(self) -> Scaling:
        """The load, and what it asks for."""
        return Scaling()

    @cached_property
    def shadow_traffic(self) -> ShadowTraffic:
        """Copies of requests for a revision that is tried."""
        return ShadowTraffic()

    @cached_property
    def outcomes(self) -> dict[int, Outcomes]:
        """What became of the requests to each revision, by its number."""
        return {}

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
        return self.stored.state in ACTIVE_STATES

    @property
    def is_settled(self) -> bool:
        """Every request is answered by the newest revision."""
        ready, newest = self.ready_replicas(), self.stored.current
        return bool(ready) and all(one.stored.revision == newest.number for one in ready)

    def ready_replicas(self) -> list[ReplicaClient]:
        """Those that can be asked."""
        return [replica for replica in self._replicas.values() if replica.weight > 0]

    @property
    def kind(self) -> str:
        """What the model is for, as its replicas say: what is of the user's own turns out when it is loaded."""
        current = self.stored.current
        if current.kind not in ("module", "python"):
            return current.kind
        known = [one for one in self._replicas.values() if one.reported.get("kind")]
        known.sort(key=lambda one: one.stored.revision == current.number)  # else as what it takes the place of
        return str(known[-1].reported["kind"]) if known else current.kind

    @property
    def adapters(self) -> list[str]:
        """Those that can be asked for: one that a new model cannot take waits until there is a model that can."""
        current = self.stored.current
        asked = [one for one in self.ready_replicas() if one.stored.revision == current.number]
        refused = {name for one in asked for name in one.reported.get("adapters_refused") or ()}
        return sorted(self.stored.adapters.keys() - refused)

    @property
    def inputs(self) -> str:
        """JSON that can be asked with, as a replica that is a module of the user's own tells it; "" for others."""
        return next((str(text) for one in self._replicas.values() if (text := one.reported.get("inputs"))), "")

    def describe(self) -> dict[str, Any]:
        """What the API tells of it: neither sockets nor tokens."""
        stored, current = self.stored, self.stored.current
        kept = {key: getattr(stored, key) for key in ("name", "state", "created", "reason", "cluster")}
        told = {key: getattr(current, key) for key in _TOLD}
        told |= {"kind": self.kind, "inputs": self.inputs}
        states = self._plan.states()
        replicas = [
            {
                "id": replica.id, "pid": replica.pid, "in_flight": replica.num_in_flight,
                "state": states.get(number, ""), "revision": replica.stored.revision, "cluster": replica.stored.cluster,
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
        return {
            **kept, **told, "revision": current.fingerprint, "replicas": replicas, "rates": rates,
            "revisions": [self._describe_revision(item) for item in stored.revisions],
            "adapters": sorted(stored.adapters), "follows": stored.follows or None,
        }  # fmt: skip

    def _describe_revision(self, revision: Revision) -> dict[str, Any]:
        told = {name: getattr(revision, name) for name in _OF_A_REVISION}
        if revision.role == SHADOW:
            traffic = self.shadow_traffic.of(revision.number)
            counts = traffic.counts
            copies = {"num_requests": counts.num_copied, "num_errors": counts.num_failed}
            return {**told, **copies, "comparison": traffic.told()}
        counted = self.outcomes.get(revision.number, Outcomes())
        return {**told, "num_requests": counted.num_requests, "num_errors": counted.num_errors}

    def adapter_of(self, model: str) -> str:
        """The adapter that a model's name stands for: `NAME:ADAPTER`, or its own name; "" for the model itself."""
        return "" if model == self.stored.name else model.removeprefix(f"{self.stored.name}:")

    def logs(self) -> list[str]:
        """Where its replicas keep their output, the newest last."""
        return [replica.log for replica in self.stored.replicas if replica.log]

    # --- what is asked of it ---

    def open(self, inherited: bool = False) -> None:
        """Begin to keep its replicas; `inherited` ones may live still and are looked for."""
        before = self.stored.replicas if inherited else []
        self._replicas = {number: ReplicaClient(number, stored) for number, stored in enumerate(before, 1)}
        for replica in self._replicas.values():
            replica.adapters = dict(self.stored.adapters)
        self.stored.state, self.stored.reason = "starting", ""
        self._save()
        revisions = served(self.stored.revisions)
        found = {number: replica.stored.revision for number, replica in self._replicas.items()}
        self._inbox.put_nowait(Resumed(revisions, found))
        self._task = asyncio.ensure_future(self._reconcile())
        self._operations[0, "scale"] = asyncio.ensure_future(self._keep_scaled())

    def follow(self, until_over: Callable[[], Awaitable[str]]) -> None:
        """Serve what a run makes, until there is no more to come."""

        async def follow() -> None:
            outcome = await until_over()
            self.stored.follows = ""
            self._save()
            newest = self.stored.current
            self._records.tell_change(self.name, "endpoint.followed", outcome=outcome, step=newest.step)

        self._operations[0, "follow"] = asyncio.ensure_future(follow())

    def change(self, revisions: Sequence[Revision]) -> None:
        """Have these revisions from now on; nothing is interrupted for that."""
        kept = list(revisions)
        while len(kept) > MAX_REVISIONS and (old := next((r for r in kept if r.role == RETIRED), None)) is not None:
            kept.remove(old)
        self.stored.revisions = kept
        self._save()
        self._inbox.put_nowait(Desired(served(kept)))

    def scale(self, num_replicas: int) -> None:
        """Have so many replicas of the stable revision."""
        self.change(scaled(self.stored.revisions, num_replicas))

    def wake(self) -> float | None:
        """Somebody asks and no replica is there: start one where none was needed. When one is due, as far as known."""
        current = self.stored.current
        if self.is_active and current.num_replicas == 0 and self.scaling.most(self._now()) != 0:
            self.scale(max(1, current.min_replicas or 0))
        if self.stored.start_s is None:
            return None
        since = self._plan.starting_since
        return self.stored.start_s if since is None else max(0.0, self.stored.start_s - (self._now() - since))

    def lender(self, held: Mapping[str, int]) -> Lender | None:
        """It, as one that may give slots back; None when its number of replicas is fixed."""
        current = self.stored.current
        if current.min_replicas is None or not self.is_active:
            return None
        mine = [held.get(replica.id, 0) for replica in self._replicas.values()]
        return Lender(
            self.name, current.priority, current.num_replicas, current.min_replicas, max(mine, default=0), sum(mine)
        )

    def give_way(self, num_replicas: int) -> None:
        """A world of higher priority waits for slots: have no more replicas than these while it does."""
        current = self.stored.current
        before = current.num_replicas
        self.scaling.hold(num_replicas, self._now() + GIVES_WAY_S)
        if num_replicas < before:
            self._records.tell_change(self.name, "endpoint.scaled", replicas=num_replicas, before=before)
            self.scale(num_replicas)

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
        replica.weight = 0
        self._inbox.put_nowait(Suspected(replica.number))

    def note_outcome(self, replica: ReplicaClient, failed: bool, num_tokens: int = 0, seconds: float = 0.0) -> None:
        """A request to a replica is over; `failed` by a fault of its own."""
        replica.breaker.note(failed, time.monotonic())
        revision = replica.stored.revision
        self.outcomes.setdefault(revision, Outcomes()).note(failed)
        if not failed:
            replica.load.measure(num_tokens, seconds)
            self.scaling.answered(seconds)
        canary = with_role(self.stored.revisions, CANARY)
        if failed and canary is not None and canary.number == revision:
            newest = self.stored.current
            stable = self.outcomes.get(newest.number, Outcomes())
            if reason := why_unhealthy(self.outcomes[revision], stable):
                self._inbox.put_nowait(RevisionFailed(revision, reason))

    def copy_to_shadow(self, path: str, body: bytes) -> ShadowCopy | None:
        """Somebody asks: the shadow, if there is one, is asked the same. Its answer is compared with the other one."""
        if (shadow := with_role(self.stored.revisions, SHADOW)) is None:
            return None
        states = self._plan.states()
        there = [r for n, r in self._replicas.items() if states.get(n) == "ready"]
        mine = [r for r in there if r.stored.revision == shadow.number]
        return self.shadow_traffic.of(shadow.number).copy(mine, path, body)

    async def set_adapter(self, name: str, folder: str) -> None:
        """Have every replica answer for an adapter too; no longer when `folder` is "". Raises ModelError."""
        body = {"name": name, "folder": folder}
        asked = self.ready_replicas()
        told = await asyncio.gather(*(one.change("/adapters", body) for one in asked), return_exceptions=True)
        refused = [error for error in told if isinstance(error, ReplicaRefusal)]
        if folder and refused:
            undo = {"name": name, "folder": self.stored.adapters.get(name, "")}
            await asyncio.gather(*(one.change("/adapters", undo) for one in asked), return_exceptions=True)
            raise ModelError(f"adapter {name!r} is not loaded: {refused[0]}")
        for error in told:  # one that is lost is replaced by one that has the adapters
            if isinstance(error, BaseException) and not isinstance(error, ReplicaRefusal | ReplicaLost):
                raise error
        for adapters in (self.stored.adapters, *(replica.adapters for replica in asked)):
            if folder:
                adapters[name] = folder
            else:
                adapters.pop(name, None)
        self._save()

    async def _catch_up(self, replica: ReplicaClient) -> None:
        """Have a replica answer for the adapters that have come, and no more for those that have gone, since it starts.

        Raises ReplicaLost.
        """
        wanted = self.stored.adapters
        for name in [name for name in {**replica.adapters, **wanted} if replica.adapters.get(name) != wanted.get(name)]:
            folder = wanted.get(name, "")
            try:
                await replica.change("/adapters", {"name": name, "folder": folder})
            except ReplicaRefusal as error:  # as where it loads them itself: the others are answered for
                self._log.warning("endpoint %s: %s has no adapter %s: %s", self.name, replica, name, error)
            replica.adapters[name] = folder
        replica.adapters = {name: folder for name, folder in replica.adapters.items() if folder}

    async def stop(self) -> None:
        """End every replica; returns when nothing is left of them."""
        self._inbox.put_nowait(Desired())
        await self.ended()

    async def ended(self) -> None:
        """Wait until nothing is left of an endpoint that is stopped or has failed."""
        if self._task is not None:
            await asyncio.wait([self._task])
        await self.shadow_traffic.close()

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
                if isinstance(event, Started | ProcessAlive | Stopped | Reloaded):
                    self._save()
        except Exception as error:  # a mistake of ours must show on the endpoint, not die with its task
            self._log.exception("endpoint %s", self.name)
            self._mark("failed", f"{type(error).__name__}: {error}")
            await asyncio.gather(*(self._end(replica) for replica in list(self._replicas.values())))
        finally:
            for kind in ("scale", "follow"):
                if (task := self._operations.pop((0, kind), None)) is not None:
                    task.cancel()

    async def _keep_scaled(self) -> None:
        """Follow the load, where bounds are given; end what was kept to be gone back to."""
        while not self._plan.is_over:
            await asyncio.sleep(EVERY_S)
            if (kept := expired(self.stored.revisions, time.time())) is not None:
                self.change(kept)
            current = self.stored.current
            replicas = self.ready_replicas()
            wanted = self.scaling.wanted(self._now(), current, replicas, self.admission.num_waiting)
            if wanted != current.num_replicas and self.is_active:
                self._records.tell_change(self.name, "endpoint.scaled", replicas=wanted, before=current.num_replicas)
                self.scale(wanted)

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
            case ReloadReplica(number, revision):
                self._operate("reload", number, partial(self._reload, revision=revision))
            case Withdraw(number, reason):
                self._withdraw(number, reason)
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
                for number, replica in self._replicas.items():
                    replica.weight = weights.get(number, 0)
                    if replica.weight:
                        replica.load.revision = self._plan.group_of(number)
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

    def _withdraw(self, number: int, reason: str) -> None:
        """A revision has failed: the one that served before it serves on alone."""
        self._log.warning("endpoint %s: revision %s is withdrawn: %s", self.name, number, reason)
        self._records.tell_change(self.name, "endpoint.rollback", revision=number, reason=reason)
        self.outcomes.pop(number, None)
        self.change(without(self.stored.revisions, number, reason))

    # --- operations: each ends with an event ---

    async def _start(self, replica: ReplicaClient, revision: Revision) -> Event:
        try:
            placed = await self._host.place(self.name, revision, self.stored.cluster)
            adapters = dict(self.stored.adapters)
            replica.adapters = dict(adapters)
            replica.stored = placed.replica  # known before it runs, so that whoever stops now ends it too
            self._save()
            replica.stored = await self._host.start(self.name, revision, placed, adapters)
        except Busy as error:
            replica.stored = StoredReplica(id="")
            return NoRoom(replica.number, f"waits for room: {error}")
        except CapacityError as error:  # nothing that this cluster has could ever hold it
            replica.stored = StoredReplica(id="")
            return Lost(replica.number, str(error), lasting=True)
        except (ModelError, NotFound, UsageError) as error:
            return Lost(replica.number, str(error), lasting=True)
        except (ReplicaGone, LLMCloudError) as error:
            self._log.warning("endpoint %s: %s", self.name, error)
            return Lost(replica.number, str(error))
        return Started(replica.number)

    async def _probe(self, replica: ReplicaClient) -> Event:
        health = await replica.health(PROBE_TIMEOUT_S)
        if health.state == "ready" and replica.adapters != self.stored.adapters:
            try:
                await self._catch_up(replica)
            except ReplicaLost as error:
                return Probed(replica.number, "unreachable", str(error))
        if health.state == "ready":
            replica.load.capacity = int(health.values.get("max_concurrent") or replica.load.capacity)
            if not replica.reported and (since := self._plan.started_at(replica.number)) is not None:
                self.stored.start_s = round(self._now() - since, 3)
            replica.reported = health.values
            return Probed(replica.number, "ready")
        if health.state == "failed":
            return Probed(replica.number, "failed", health.reason)
        if health.state == "silent":
            self._log.warning("endpoint %s: %s: %s", self.name, replica, health.reason)
        if health.state == "unreachable" and replica.reported and (why := await self._why_gone(replica)):
            return Probed(replica.number, health.state, why)
        return Probed(replica.number, health.state, f"{replica}: {health.reason or f'it says: {health.state}'}")

    async def _why_gone(self, replica: ReplicaClient) -> str:
        """What its agent knows of a replica that has answered before and is gone."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._host.find(replica.stored, was_ready=True)
        except (ReplicaGone, LLMCloudError, TimeoutError) as error:
            self._log.warning("endpoint %s: %s", self.name, error)
            self._records.tell_change(self.name, "endpoint.replica_lost", replica=replica.id, reason=str(error))
            return str(error)
        return ""

    async def _reload(self, replica: ReplicaClient, revision: Revision) -> Event:
        body = {"model": revision.model, "dtype": revision.dtype, "revision": revision.number}
        try:
            await replica.change("/reload", body)
        except ReplicaRefusal as error:
            self._log.warning("endpoint %s: %s keeps its weights: %s", self.name, replica, error)
            return Reloaded(replica.number, revision.number, str(error))
        except ReplicaLost as error:
            return Lost(replica.number, str(error))
        replica.stored = dataclasses.replace(replica.stored, revision=revision.number)
        replica.load.forget()
        return Reloaded(replica.number, revision.number)

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
