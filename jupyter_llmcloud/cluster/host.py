"""The host process of a cluster: holds the Dask cluster object, so that it belongs to no kernel and no server.

    python -m jupyter_llmcloud.cluster.host      one JSON line on standard input: its record and its lease

It writes `cluster.json` when the cluster runs (or has failed), answers on `control.sock`, and ends on request or when
its owner has been gone for the lease and nothing runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import signal
import sys
import time
from dataclasses import asdict
from typing import Any

import dask
import psutil
from distributed import Client, Security

from jupyter_llmcloud.cluster.dask_config import DASK_SETTINGS, TLS_SETTINGS
from jupyter_llmcloud.cluster.factory import make_cluster
from jupyter_llmcloud.cluster.kinds.adaptive import RankAdaptive
from jupyter_llmcloud.cluster.low_overhead import LowOverheadPlugin
from jupyter_llmcloud.cluster.record import ClusterRecord
from jupyter_llmcloud.cluster.tunnel.relay import RelayPlugin
from jupyter_llmcloud.cluster.worker_plugin import AgentPlugin, agents_there, end_agent, is_agent_busy, register
from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError, UsageError
from jupyter_llmcloud.protocol.agent_messages import (
    AdoptCluster,
    ClusterDescription,
    ScaleCluster,
    Shutdown,
    StopCluster,
)
from jupyter_llmcloud.protocol.client import AgentConnection
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import Unreadable
from jupyter_llmcloud.protocol.rpc import Request, Responder, refusal
from jupyter_llmcloud.system import unix_sockets

WATCH_S = 1.0
ASK_AGAIN_S = 1.0
POLL_S = 0.05
SCALE_S = 60.0


class ClusterHost:
    """Starts, scales and ends one cluster."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.record = ClusterRecord(**spec["record"])
        self.lease_s: float = spec["lease_s"]
        self.cluster: Any = None
        self.client: Client | None = None
        self._finished = asyncio.Event()
        self._growing: asyncio.Task[None] | None = None  # to the size that was asked for last
        self._adaptive: Any = None  # what changes the size by itself

    async def serve(self) -> None:
        """Until stopped or without an owner for the lease."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._finished.set)
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        me = psutil.Process()
        self.record.pid, self.record.pid_started = me.pid, me.create_time()
        try:
            await self._start()
        except Exception as error:
            self.record.state = "failed"
            self.record.reason = str(error) if isinstance(error, LLMCloudError) else f"{type(error).__name__}: {error}"
            self.record.save()
            await self._close()
            return
        server = await unix_sockets.listen(self.record.control, self._connected)
        self.record.state = "running"
        self.record.save()
        watch = asyncio.create_task(self._watch_owner())
        await self._finished.wait()
        watch.cancel()
        server.close()
        await self._close()
        self.record.forget()

    async def _start(self) -> None:
        options = dict(self.record.options)
        slots = options.pop("slots", None)
        if slots is not None and (not isinstance(slots, int) or slots < 1):
            raise UsageError(f"slots={slots}: expected a whole number of at least 1.")
        security = Security.temporary() if self.record.kind == "local" else None
        self.cluster = await make_cluster(self.record.kind, self.record.workers, options, security)
        security = security or getattr(self.cluster, "security", None)
        self.client = await Client(self.cluster, asynchronous=True, set_as_default=False)
        with contextlib.suppress(Exception):  # without this package there: workers are reached directly or not
            await self.client.register_plugin(RelayPlugin())
            await self.client.register_plugin(LowOverheadPlugin())
        await register(self.client, AgentPlugin(self.record.cluster_id, slots))
        self.record.address = self.cluster.scheduler_address
        self.record.dashboard = self.cluster.dashboard_link or ""
        self.record.tls = tls_of(security)

    async def _close(self) -> None:
        with contextlib.suppress(Exception):
            await self._shut_agents_down()
        for part in (self.client, self.cluster):
            if part is not None:
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(part.close(), 20)

    async def _shut_agents_down(self) -> None:
        if self.client is None:
            return
        await self.client.run(end_agent, on_error="ignore")

    async def _watch_owner(self) -> None:
        gone_since: float | None = None
        while not self._finished.is_set():
            await asyncio.sleep(WATCH_S)
            try:
                is_needed = self.record.has_owner or await self._is_busy()
            except (OSError, RuntimeError, ValueError):  # the scheduler did not answer: the next time
                continue
            if is_needed:
                gone_since = None
            elif gone_since is None:
                gone_since = time.monotonic()
            elif time.monotonic() - gone_since > self.lease_s:
                self._finished.set()

    async def _is_busy(self) -> bool:
        assert self.client is not None
        busy = await self.client.run(is_agent_busy, on_error="return")
        return any(row is True for row in busy.values())

    async def _until_workers(self, number: int) -> None:
        """Until so many workers have an agent, however long a batch system takes.

        A worker that was lost, with its job say, Dask counts for two minutes more (lost-worker-timeout), and starts
        another one in its place only when it is asked after that.
        """
        assert self.client is not None
        loop = asyncio.get_running_loop()
        asked = loop.time()
        while sum(row is not None for row in (await agents_there(self.client)).values()) < number:
            await asyncio.sleep(POLL_S)
            if loop.time() - asked > ASK_AGAIN_S:
                await self._ask_dask(number)
                asked = loop.time()

    async def _ask_dask(self, number: int) -> None:
        """Some clusters of Dask do as they are asked at once, others when they are awaited."""
        if inspect.isawaitable(asking := self.cluster.scale(number)):
            await asking

    # --- control ---

    def _make_responder(self) -> Responder:
        responder = Responder(f"the host process of cluster {self.record.name!r}")
        responder.on(ScaleCluster, self._change_size)
        responder.on(AdoptCluster, self._adopt)
        responder.on(StopCluster, self._stop)
        return responder

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer, "whoever asks this host process")
        responder = self._make_responder()
        try:
            async for message in connection.messages():
                if isinstance(message, Request | Unreadable):
                    await responder.serve(message, connection.send)
        except LLMCloudError as error:  # what came is no message of this version
            connection.send(refusal(error))
        connection.close()

    def _describe(self) -> ClusterDescription:
        return ClusterDescription(record=asdict(self.record))

    async def _change_size(self, asked: ScaleCluster) -> ClusterDescription:
        if self._growing is not None:
            self._growing.cancel()
        if asked.maximum:
            self._adapt(asked.minimum, asked.maximum)
        else:
            await self._scale(asked.workers)
        return self._describe()

    def _adapt(self, minimum: int, maximum: int) -> None:
        """Raises UsageError for a cluster whose workers somebody else would end."""
        if not {"Adaptive", "kwargs"} & inspect.signature(self.cluster.adapt).parameters.keys():
            raise UsageError(
                f"%cluster adapt: a cluster of kind {self.record.kind!r} ends workers itself when Dask gives them no "
                "tasks, and to Dask a worker whose ranks train is idle. %cluster scale N sets how many there are."
            )
        assert self.client is not None
        kind = functools.partial(RankAdaptive, client=self.client)
        self._adaptive = self.cluster.adapt(Adaptive=kind, minimum=minimum, maximum=maximum)

    def _adopt(self, asked: AdoptCluster) -> ClusterDescription:
        self.record.owner_pid, self.record.owner_started = asked.owner_pid, asked.owner_started
        self.record.save()
        return self._describe()

    def _stop(self, _: StopCluster) -> ClusterDescription:
        asyncio.get_running_loop().call_later(0.05, self._finished.set)  # when the reply has left
        return self._describe()

    async def _scale(self, workers: int) -> None:
        """Ask for so many workers and wait for them, for a minute: what a batch system has no place for comes later."""
        assert self.client is not None
        before = {worker: row["address"] for worker, row in (await agents_there(self.client)).items() if row}
        if self._adaptive is not None:  # which would go on between its bounds
            self._adaptive.stop()
            self._adaptive = None
        await self._ask_dask(workers)
        await self.cluster
        self._growing = asyncio.create_task(self._until_workers(workers))
        await asyncio.wait([self._growing], timeout=SCALE_S)
        if self._growing.done():
            self._growing.result()
        after = await agents_there(self.client) if workers else {}
        staying = {row["address"] if row else before.get(worker) for worker, row in after.items()}
        for address in set(before.values()) - staying:
            with contextlib.suppress(ConnectionLost):
                async with await AgentConnection.open(address, 2) as connection:
                    await connection.request(Shutdown(cluster_stays=bool(staying)), 5)


def tls_of(security: Any) -> dict[str, str]:
    """What a client needs to connect: certificates as PEM text."""
    if security is None or not getattr(security, "tls_client_cert", None):
        return {}
    return {"ca": security.tls_ca_file, "cert": security.tls_client_cert, "key": security.tls_client_key}


def security_from(tls: dict[str, str]) -> Security | None:
    """The Security of a client; None for a cluster without TLS."""
    if not tls:
        return None
    return Security(
        tls_ca_file=tls["ca"], tls_client_cert=tls["cert"], tls_client_key=tls["key"], require_encryption=True
    )


def main() -> None:
    """Read the spec, serve."""
    spec = json.loads(sys.stdin.readline())
    secure = TLS_SETTINGS if spec["record"]["kind"] == "local" else {}
    dask.config.set({**DASK_SETTINGS, **secure})
    asyncio.run(ClusterHost(spec).serve())


if __name__ == "__main__":
    main()
