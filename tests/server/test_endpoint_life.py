"""Endpoints outlive their replicas and their server."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path

from jupyter_llmcloud.server.context import Identity, ServerContext
from tests.support.server_parts import Server, StandInAgent, StandInPool, until

pytest_plugins = ["tests.support.server_fixtures"]


def make_context(agent: StandInAgent, identity: Identity | None = None) -> ServerContext:
    context = ServerContext(logging.getLogger(), identity=identity)
    pool = StandInPool(agent)

    async def make_pool() -> StandInPool:
        return pool

    context.make_pool = make_pool
    return context


async def test_a_killed_replica_is_replaced_within_ten_seconds(server: Server, model: Path) -> None:
    told = await server.serve(model)
    os.kill(told["replicas"][0]["pid"], signal.SIGKILL)
    began = asyncio.get_running_loop().time()

    async def is_back() -> bool:
        now = (await server.ask("GET", "llmcloud/api/endpoints/tiny")).json()
        pids = [replica["pid"] for replica in now["replicas"]]
        return now["state"] == "ready" and bool(pids) and pids[0] != told["replicas"][0]["pid"]

    await until(is_back, "another replica is ready")
    assert asyncio.get_running_loop().time() - began < 10
    assert (await server.complete("hello")).status_code == 200


async def test_a_restarted_server_finds_its_endpoint_and_the_same_replica(agent: StandInAgent, model: Path) -> None:
    first = make_context(agent)
    await first.started()
    endpoint = await first.endpoints.create(str(model), "tiny")
    await endpoint.wait("starting", 20)
    [pid] = [replica.pid for replica in endpoint.ready_replicas()]
    await first.close()
    assert agent.processes and all(process.poll() is None for process in agent.processes.values())

    second = make_context(agent)
    await second.started()
    found = second.endpoints.get("tiny")
    await found.wait("starting", 20)
    assert [replica.pid for replica in found.ready_replicas()] == [pid]
    await second.endpoints.stop("tiny")
    await second.close()


async def test_a_replica_that_went_with_its_server_is_started_again(agent: StandInAgent, model: Path) -> None:
    first = make_context(agent)
    await first.started()
    endpoint = await first.endpoints.create(str(model), "tiny")
    await endpoint.wait("starting", 20)
    await first.close()
    for process in agent.processes.values():
        process.kill()
        process.wait()

    second = make_context(agent)
    await second.started()
    found = second.endpoints.get("tiny")
    await until(found.ready_replicas, "a new replica is ready")
    assert len(agent.processes) == 2
    await second.endpoints.stop("tiny")
    await second.close()


async def test_a_stopped_endpoint_stays_stopped_after_a_restart(agent: StandInAgent, model: Path) -> None:
    first = make_context(agent)
    await first.started()
    await (await first.endpoints.create(str(model), "tiny")).wait("starting", 20)
    await first.endpoints.stop("tiny")
    await first.close()
    second = make_context(agent)
    await second.started()
    assert second.endpoints.get("tiny").stored.state == "stopped"
    await second.close()


async def test_two_living_servers_do_not_take_each_others_endpoints(agent: StandInAgent, model: Path) -> None:
    first, second = make_context(agent), make_context(agent)
    await first.started()
    await (await first.endpoints.create(str(model), "tiny")).wait("starting", 20)
    await second.started()
    assert second.endpoints.list() == []
    await first.endpoints.stop("tiny")
    await first.close()
    await second.close()


async def test_a_headless_server_takes_its_endpoints_and_clusters_along(agent: StandInAgent, model: Path) -> None:
    context = make_context(agent, Identity(headless=True, owner_pid=os.getpid()))
    await context.started()
    await (await context.endpoints.create(str(model), "tiny")).wait("starting", 20)
    pool = await context.pool()
    await context.close()
    assert pool.closed
    assert all(process.poll() is not None for process in agent.processes.values())
    follower = make_context(agent)
    await follower.started()
    assert follower.endpoints.list() == []
    await follower.close()


async def test_stopping_an_endpoint_that_is_still_starting_leaves_no_replica(agent: StandInAgent, model: Path) -> None:
    (model / "slow").touch()
    context = make_context(agent)
    await context.started()
    await context.endpoints.create(str(model), "tiny", num_replicas=2)
    await until(lambda: len(agent.processes) == 2, "both replicas are started")
    await context.endpoints.stop("tiny")
    assert all(process.poll() is not None for process in agent.processes.values())
    await context.close()
