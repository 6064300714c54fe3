"""Slots for ranks elsewhere: asked of the Dask worker that holds this agent, which knows the cluster."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection
from typing import Any

from jupyter_llmcloud.agent.ranks.devices import Devices
from jupyter_llmcloud.core.scheduling.placement import agent_key
from jupyter_llmcloud.errors import Busy, CapacityError, LLMCloudError
from jupyter_llmcloud.protocol.agent_messages import FindStandby, PlaceRanks
from jupyter_llmcloud.protocol.connection import Connection

ASK_TIMEOUT_S = 30.0


class WorkerClient:
    """The workers that hold this agent, and what is asked of them. The run's kernel and server may be gone by then.

    Args:
        address: this agent's socket.
        devices: where ranks go when nobody can be asked.
    """

    def __init__(self, address: str, devices: Devices) -> None:
        self._address = address
        self._devices = devices
        self._workers: dict[Connection, bool] = {}  # and whether they can be asked

    @property
    def key(self) -> str:
        """Names this agent alike on every host."""
        return agent_key(socket.gethostname(), self._address)

    @property
    def is_there(self) -> bool:
        """Whether a worker holds this agent."""
        return bool(self._workers)

    @property
    def can_be_asked(self) -> bool:
        """Whether a worker holds this agent that knows the cluster."""
        return any(self._workers.values())

    def held_by(self, worker: Connection, finds_capacity: bool) -> bool:
        """A worker renews the agent's lease; returns whether one that knows the cluster does so for the first time."""
        is_new = finds_capacity and not self._workers.get(worker)
        self._workers[worker] = finds_capacity
        return is_new

    def forget(self, connection: Connection) -> None:
        """A connection has ended, perhaps a worker's."""
        self._workers.pop(connection, None)

    async def find(
        self, num_ranks: int, at_once: bool = False, at_least: int = 0, without: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Shares for ranks that have lost their place: anywhere in the cluster, or here when nobody can be asked.

        See PlaceRanks. Raises Busy when there is no room.
        """
        for worker in self._that_find_capacity():
            try:
                asked = PlaceRanks(num_ranks=num_ranks, at_once=at_once, at_least=at_least, without=list(without))
                return (await worker.request(asked, ASK_TIMEOUT_S)).agents
            except CapacityError as error:
                raise Busy(str(error)) from None
            except LLMCloudError:
                continue  # this worker cannot tell
        if self.key in without:
            raise Busy(f"{num_ranks} ranks have lost their place, and this host is left out.")
        if at_least:
            num_ranks = max(at_least, min(num_ranks, len(self._devices.free)))
        if len(self._devices.free) < num_ranks:
            raise Busy(f"{num_ranks} ranks have lost their place, and the cluster has no room for them now.")
        here = socket.gethostname()
        return [{"address": self._address, "home": self._address, "num_ranks": num_ranks, "host": here}]

    async def find_stand_by(self) -> str:
        """A socket for another agent, on another host if there is one; "" when there is none or nobody can be asked."""
        for worker in self._that_find_capacity():
            with contextlib.suppress(LLMCloudError):
                return (await worker.request(FindStandby(), ASK_TIMEOUT_S)).address
        return ""

    def _that_find_capacity(self) -> list[Connection]:
        return [worker for worker, finds_capacity in self._workers.items() if finds_capacity]
