"""The Dask client of a cluster: opened, asked for the agents beside its workers, told to have such."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from distributed import Client

from jupyter_llmcloud.cluster.record import ClusterRecord
from jupyter_llmcloud.cluster.tunnel.relay import RelayPlugin
from jupyter_llmcloud.cluster.worker_plugin import AgentPlugin, agent_info

CONNECT_TIMEOUT_S = 8.0
ASK_AGAIN_S = 2.0


async def open_client(address: str) -> Client:
    """A client of a cluster that somebody else has started."""
    client = Client(address, asynchronous=True, set_as_default=False)
    try:
        await asyncio.wait_for(client, CONNECT_TIMEOUT_S)
    except BaseException:
        with contextlib.suppress(Exception):
            await client.close()
        raise
    return client


async def install(client: Client, record: ClusterRecord) -> None:
    """Have agents beside the workers of a cluster that somebody else has started."""
    with contextlib.suppress(Exception):  # a scheduler that allows no plugins: workers are reached directly or not
        await client.register_plugin(RelayPlugin())
    await client.register_plugin(AgentPlugin(record.cluster_id, record.options.get("slots")))


async def ask_agents(client: Client) -> dict[str, Any]:
    """What each worker says of its agent, or the error by which it said nothing, by the worker's address.

    Asked again after a while: the scheduler tries for a minute to reach a worker of whose end it has not heard yet.
    """
    asked: set[asyncio.Task[dict[str, Any]]] = set()
    patience_s = ASK_AGAIN_S
    try:
        while True:
            asked.add(asyncio.create_task(client.run(agent_info, on_error="return")))
            done, _ = await asyncio.wait(asked, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            patience_s *= 2
            if done:
                return done.pop().result()
    finally:
        for task in asked:
            task.cancel()
