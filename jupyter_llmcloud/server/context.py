"""The services of one server, made once and handed to the handlers that use them."""

from __future__ import annotations

import asyncio
import uuid
from functools import cached_property
from typing import TYPE_CHECKING

import psutil

from jupyter_llmcloud.server.answers.keeper import Keeper
from jupyter_llmcloud.server.api.run_starts import RunStarts
from jupyter_llmcloud.server.api.run_states import SERVER, RunStates
from jupyter_llmcloud.server.audit import Audit
from jupyter_llmcloud.server.batches.asking import RowAsker
from jupyter_llmcloud.server.batches.batches import BatchRegistry
from jupyter_llmcloud.server.cluster_access import ClusterAccess, Identity
from jupyter_llmcloud.server.datasets.preparations import Preparations
from jupyter_llmcloud.server.endpoints.alerts import EndpointMonitor
from jupyter_llmcloud.server.endpoints.records import EndpointRecords
from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry
from jupyter_llmcloud.server.endpoints.replica_host import ReplicaHost
from jupyter_llmcloud.server.events.polling import PollSessions
from jupyter_llmcloud.server.events.resources import Resources
from jupyter_llmcloud.server.events.service import EventService
from jupyter_llmcloud.server.events.topics import Topics, changed_by
from jupyter_llmcloud.server.gateway.key_alerts import KeyMonitor
from jupyter_llmcloud.server.gateway.key_quotas import KeyQuotas
from jupyter_llmcloud.server.gateway.metrics import ENDPOINTS
from jupyter_llmcloud.server.gateway.open_requests import OpenRequests
from jupyter_llmcloud.server.recorded.run_metrics import RUNS
from jupyter_llmcloud.server.sweeps.gang import ClusterDoors
from jupyter_llmcloud.server.sweeps.sweeps import SweepRegistry
from jupyter_llmcloud.server.watches.series_windows import SeriesWindows
from jupyter_llmcloud.storage.runs import RunStore
from jupyter_llmcloud.storage.server_state import ServerState
from jupyter_llmcloud.storage.serving.feedback import FeedbackStore
from jupyter_llmcloud.system.processes import is_process

if TYPE_CHECKING:
    from collections.abc import Sequence
    from logging import Logger
    from pathlib import Path

    from jupyter_events import EventLogger

    from jupyter_llmcloud.storage.server_state import RequestRecord


class ServerContext:
    """Everything behind the routes. Starts with the first request that needs it, or with the server's loop."""

    def __init__(
        self,
        log: Logger,
        event_logger: EventLogger | None = None,
        identity: Identity | None = None,
        root_dir: Path | None = None,
    ) -> None:
        self.identity = identity or Identity()
        self.server_id = uuid.uuid4().hex[:16]
        self.state = ServerState()
        self.audit = Audit(self.state, event_logger, log)
        self.runs = RunStore()
        self.clusters = ClusterAccess(self.identity)
        self.starts = RunStarts(self.runs, f"{SERVER}{self.server_id}", self.clusters.pool, self.clusters.agent)
        self.run_states = RunStates(self.server_id, self.runs, self.clusters, self.starts, self.state)
        self.endpoints = EndpointRegistry(
            EndpointRecords(self.state, self.audit, self.server_id, log),
            ReplicaHost(self.clusters.pool, self.clusters.agent),
            self.runs,
            root_dir,
            log,
        )
        self.clusters.on_shortage = self.endpoints.give_way
        monitor = EndpointMonitor(self.audit, log)

        def tell(records: Sequence[RequestRecord]) -> None:
            self.audit.tell_requests(records)
            monitor.answered(records)

        self.requests = OpenRequests(self.state, KeyMonitor(self.audit, log), log, tell)
        ENDPOINTS.add(self.endpoints)
        RUNS.add(self, self.runs)
        self.audit.listen(lambda action: self.events.wake(*changed_by(action)))
        self._started: asyncio.Task[None] | None = None
        self._closed = False

    @cached_property
    def events(self) -> EventService:
        """What changes, for those who follow it."""
        resources = Resources(self.clusters, self.runs)
        events = EventService(self.server_id, self.runs, self.run_states, resources)
        topics = Topics(self.clusters, resources, self.endpoints, self.state)
        topics.add_to(events, self.runs, self.run_states)
        return events

    @cached_property
    def polls(self) -> PollSessions:
        """Those who follow it without a websocket."""
        return PollSessions(self.events)

    def keep_usage(self, days: float) -> None:
        """How long a row of usage is kept. Raises UsageError."""
        self.requests.keep(days)

    @property
    def alerts(self) -> KeyMonitor:
        """What is unusual in the use of keys."""
        return self.requests.alerts

    @cached_property
    def quotas(self) -> KeyQuotas:
        """What keys have used of late."""
        return KeyQuotas(self.state)

    @cached_property
    def keeper(self) -> Keeper:
        """Requests that are kept, and what is said of them."""
        return Keeper(FeedbackStore(), self.requests.log)

    @cached_property
    def batches(self) -> BatchRegistry:
        """Many requests, answered when there is room."""
        log = self.requests.log
        asker = RowAsker(self.endpoints, self.requests, self.quotas, self.keeper, self.state, log)
        return BatchRegistry(asker, self.audit, log)

    @cached_property
    def preparations(self) -> Preparations:
        """Data that is prepared on clusters."""
        return Preparations(self.clusters, self.audit, self.requests.log)

    @cached_property
    def sweeps(self) -> SweepRegistry:
        """Searches of hyperparameters."""
        return SweepRegistry(ClusterDoors(self.clusters.pool, self.clusters.agent), self.audit, self.requests.log)

    @cached_property
    def series(self) -> SeriesWindows:
        """Metrics of runs that are looked at from near."""
        return SeriesWindows()

    async def started(self) -> None:
        """Wait until the endpoints that this server inherits are known again. What has failed is tried again."""
        failed = self._started is not None and self._started.done() and self._started.exception() is not None
        if self._started is None or failed:
            self._started = asyncio.ensure_future(self._start())
        await asyncio.shield(self._started)

    async def _start(self) -> None:
        me = psutil.Process()
        self.state.register_server(self.server_id, me.pid, me.create_time(), self.identity.headless)
        self._inherit()
        await self.endpoints.start()
        self.batches.start()

    def _inherit(self) -> None:
        """Take over the endpoints of servers that are gone; those of a headless server went with it."""
        for server in self.state.servers():
            if server["id"] == self.server_id or is_process(server["pid"], server["started"]):
                continue
            if self.identity.headless and not server["headless"]:
                continue  # left for the Jupyter server that follows it
            if not server["headless"]:
                self.state.adopt_endpoints(server["id"], self.server_id)
            self.state.forget_server(server["id"])

    async def close(self) -> None:
        """The server ends: a headless one takes its endpoints and clusters along, any other leaves them running."""
        if self._closed:
            return
        self._closed = True
        if self._started is not None:
            await asyncio.gather(self._started, return_exceptions=True)
        self.polls.close()
        self.events.close()
        await self.starts.close()
        await self.batches.close()
        await self.preparations.close()
        await self.sweeps.close()
        await self.requests.close()
        await self.keeper.close()
        ENDPOINTS.discard(self.endpoints)
        RUNS.discard(self)
        await self.endpoints.close(stop=self.identity.headless)
        await self.clusters.close()
        if self.identity.headless:
            self.state.forget_server(self.server_id)
        else:
            self.state.register_server(self.server_id, 0, 0.0, headless=False)  # to be adopted
        self.state.close()
