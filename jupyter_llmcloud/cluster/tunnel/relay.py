"""The two ways to a socket beside a worker: a comm straight to the worker, or one that the scheduler passes on.

Where workers have addresses of their own network only (Kubernetes, a gateway, a batch system behind a login node) a
client reaches nothing but the scheduler. Its plugin joins the client's comm with one of its own to the worker. Both
ways begin alike: one request, answered when the far socket is open, so that who asked knows what it has got.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed import Scheduler, SchedulerPlugin
from distributed.comm import connect
from distributed.comm.core import Comm
from distributed.core import Status

from jupyter_llmcloud.cluster.tunnel.pump import carry, join
from jupyter_llmcloud.core.scheduling.routes import RELAYED, Routes
from jupyter_llmcloud.errors import ConnectionLost, NotFound

TUNNEL = "llmcloud_tunnel"  # the operation that a worker's plugin answers
RELAY = "llmcloud_relay"  # the one that the scheduler's answers
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0


class SocketRoutes:
    """Opens comms to sockets beside the workers of one cluster.

    Args:
        scheduler: its address, as it is now.
        connection_args: how a comm of this process is secured, as it is now.
    """

    def __init__(self, scheduler: Callable[[], str], connection_args: Callable[[], dict[str, Any]]) -> None:
        self.routes = Routes()
        self._scheduler = scheduler
        self._connection_args = connection_args

    async def open(self, worker: str, name: str, target: str) -> tuple[Comm, str]:
        """A comm to the socket `target`, and the worker's address as it is now: one that was replaced has another.

        Raises NotFound when nobody listens there any more, ConnectionLost when neither route leads there.
        """
        failures = []
        for route in self.routes.order(worker, time.monotonic()):
            request = {"op": TUNNEL, "target": target}
            address = worker
            if route == RELAYED:
                request = {"op": RELAY, "worker": worker, "name": name, "target": target}
                address = self._scheduler()
            try:
                comm, answer = await _ask(address, request, self._connection_args())
            except (OSError, TimeoutError) as error:
                self.routes.failed(worker, route, time.monotonic())
                failures.append(f"{route}: {error or type(error).__name__}")
                continue
            self.routes.worked(worker, route)
            return comm, answer.get("worker", worker)
        raise ConnectionLost(f"the worker {name} cannot be reached ({'; '.join(failures)}).")


async def _ask(address: str, request: dict[str, Any], connection_args: dict[str, Any]) -> tuple[Comm, dict[str, Any]]:
    """Open a comm whose far end stands for a socket. Raises OSError, TimeoutError; NotFound when that has gone."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):  # an end that accepts and then says nothing is no route either
            comm = await connect(address, timeout=CONNECT_TIMEOUT_S, **connection_args)
    except (ValueError, RuntimeError) as error:  # of tornado, when the other end closes in the middle of the handshake
        raise OSError(str(error)) from error
    try:
        await comm.write({**request, "reply": False})
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            answer = await comm.read()
        if not isinstance(answer, dict) or "error" in answer or "open" not in answer:
            raise OSError(str(answer.get("error", answer) if isinstance(answer, dict) else answer))
        if not answer["open"]:
            raise NotFound(str(answer["reason"]))
    except BaseException:
        comm.abort()
        raise
    return comm, answer


async def answer_tunnel(comm: Comm, folder: Path, target: str) -> Status:
    """The worker's end: pass a comm on to a socket in the folder of its own agent."""
    path = Path(target)
    if path.parent != folder:  # the address of a worker that has ended can be another's by now
        await comm.write({"error": f"{target} is not beside this worker"})
        return Status.dont_reply
    try:
        reader, writer = await asyncio.open_unix_connection(str(folder / path.name))
    except OSError as error:
        await comm.write({"open": False, "reason": f"nobody listens at {target} any more: {error.strerror or error}."})
        return Status.dont_reply
    try:
        await comm.write({"open": True})
        await carry(comm, reader, writer)
    finally:
        writer.close()
    return Status.dont_reply


class RelayPlugin(SchedulerPlugin):
    """Has the scheduler pass comms on to workers that their client cannot reach."""

    name = "llmcloud-relay"
    idempotent = True

    def __init__(self) -> None:
        self._server: Scheduler | None = None

    async def start(self, scheduler: Scheduler) -> None:
        """Called by Dask."""
        self._server = scheduler
        scheduler.handlers[RELAY] = self._relay

    async def _relay(self, comm: Comm, worker: str, name: str, target: str) -> Status:
        assert self._server is not None
        if worker not in self._server.workers:
            names = {str(state.name): address for address, state in self._server.workers.items()}
            worker = names.get(name, worker)
        try:
            far, _ = await _ask(worker, {"op": TUNNEL, "target": target}, self._server.connection_args)
        except NotFound as gone:
            await comm.write({"open": False, "reason": str(gone)})
            return Status.dont_reply
        except (OSError, TimeoutError) as error:
            await comm.write({"error": f"the scheduler does not reach the worker {name}: {error}"})
            return Status.dont_reply
        try:
            await comm.write({"open": True, "worker": worker})
            await join(comm, far)
        finally:
            with contextlib.suppress(OSError):
                far.abort()
        return Status.dont_reply
