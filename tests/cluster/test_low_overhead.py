"""A cluster that only stands by takes little from the machine on which its ranks train."""

from __future__ import annotations

import asyncio

import dask
from distributed import Client, Scheduler, Worker

from jupyter_llmcloud.cluster.dask_config import DASK_SETTINGS
from jupyter_llmcloud.cluster.low_overhead import HEARTBEAT_S, LOOK_S, LOOKS, LowOverheadPlugin


def test_workers_report_seldom_and_a_lost_one_is_seen_at_once_all_the_same() -> None:
    asyncio.run(_report_and_be_lost())


async def _report_and_be_lost() -> None:
    with dask.config.set(DASK_SETTINGS):
        async with (
            Scheduler(host="127.0.0.1", dashboard=False) as scheduler,
            Worker(scheduler.address, memory_limit=0) as worker,
            Client(scheduler.address, asynchronous=True, set_as_default=False) as client,
        ):
            await client.register_plugin(LowOverheadPlugin())
            await worker.heartbeat()
            assert worker.periodic_callbacks["heartbeat"].callback_time == 1000 * HEARTBEAT_S
            assert [scheduler.periodic_callbacks[name].callback_time for name in LOOKS] == [1000 * LOOK_S] * len(LOOKS)
            assert await client.submit(len, "still works") == 11
            worker.batched_stream.comm.abort()
            worker.periodic_callbacks["heartbeat"].stop()
            async with asyncio.timeout(HEARTBEAT_S):
                while scheduler.workers:
                    await asyncio.sleep(0.01)
