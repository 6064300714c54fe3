"""Endpoints outlive their replicas and their server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from jupyter_llmcloud.core.serving.usage.stream_usage import UsageCut
from jupyter_llmcloud.core.spec import EndpointSpec
from jupyter_llmcloud.server.cluster_access import Identity
from jupyter_llmcloud.server.context import ServerContext
from jupyter_llmcloud.server.endpoints.controller import EndpointController
from jupyter_llmcloud.server.endpoints.replica_host import ReplicaHost
from jupyter_llmcloud.storage.server_state import ServerState
from tests.support.server_parts import Server, StandInAgent, StandInPool, until

pytest_plugins = ["tests.support.server_fixtures"]


def make_context(agent: StandInAgent, identity: Identity | None = None) -> ServerContext:
    context = ServerContext(logging.getLogger(), identity=identity)
    pool = StandInPool(agent)

    async def make_pool() -> StandInPool:
        return pool

    context.clusters.make_pool = make_pool
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
    endpoint = await first.endpoints.create(str(model), EndpointSpec(name="tiny"))
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
    endpoint = await first.endpoints.create(str(model), EndpointSpec(name="tiny"))
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
    await (await first.endpoints.create(str(model), EndpointSpec(name="tiny"))).wait("starting", 20)
    await first.endpoints.stop("tiny")
    await first.close()
    second = make_context(agent)
    await second.started()
    assert second.endpoints.get("tiny").stored.state == "stopped"
    await second.close()


async def test_two_living_servers_do_not_take_each_others_endpoints(agent: StandInAgent, model: Path) -> None:
    first, second = make_context(agent), make_context(agent)
    await first.started()
    await (await first.endpoints.create(str(model), EndpointSpec(name="tiny"))).wait("starting", 20)
    await second.started()
    assert second.endpoints.list() == []
    await first.endpoints.stop("tiny")
    await first.close()
    await second.close()


async def test_a_headless_server_takes_its_endpoints_and_clusters_along(agent: StandInAgent, model: Path) -> None:
    context = make_context(agent, Identity(headless=True, owner_pid=os.getpid()))
    await context.started()
    await (await context.endpoints.create(str(model), EndpointSpec(name="tiny"))).wait("starting", 20)
    pool = await context.clusters.pool()
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
    await context.endpoints.create(str(model), EndpointSpec(name="tiny", replicas=2))
    await until(lambda: len(agent.processes) == 2, "both replicas are started")
    await context.endpoints.stop("tiny")
    assert all(process.poll() is not None for process in agent.processes.values())
    await context.close()


# --- faults under a request ---


def complete(server: Server, prompt: str, **body: Any) -> asyncio.Future[httpx.Response]:
    return asyncio.ensure_future(server.complete(prompt, **body))


async def first_event(server: Server, prompt: str = "endless") -> tuple[Any, Any]:
    """A stream that has begun, and its lines."""
    body = {"model": "tiny", "prompt": prompt, "stream": True}
    request = server.client.build_request(
        "POST",
        f"{server.url}/llmcloud/v1/completions",
        json=body,
        headers={"Authorization": f"token {server.token}"},
    )
    answer = await server.client.send(request, stream=True)
    lines = answer.aiter_lines()
    await anext(lines)
    return answer, lines


async def last_error(answer: Any, lines: Any) -> dict[str, Any]:
    """The error that ends a stream; [DONE] must not follow."""
    rest = [line async for line in lines if line]
    await answer.aclose()
    assert "data: [DONE]" not in rest
    return json.loads(rest[-1].removeprefix("data: "))["error"]


def replica_states(server: Server) -> list[str]:
    return [replica["state"] for replica in server.context.endpoints.get("tiny").describe()["replicas"]]


def nothing_is_in_flight(server: Server) -> bool:
    ready = server.context.endpoints.get("tiny").ready_replicas()
    return not REGISTRY.get_sample_value("llmcloud_requests_in_flight") and not any(r.num_in_flight for r in ready)


async def test_a_stream_of_a_frozen_replica_ends_within_fifteen_seconds_and_says_why(
    server: Server, model: Path
) -> None:
    told = await server.serve(model)
    answer, lines = await first_event(server)
    os.kill(told["replicas"][0]["pid"], signal.SIGSTOP)
    began = time.monotonic()
    error = await last_error(answer, lines)
    assert time.monotonic() - began < 15
    assert error["code"] == "replica_lost" and "no answer to /readyz" in error["message"]
    await until(lambda: nothing_is_in_flight(server), "the gauges are back at 0")
    await until(server.context.endpoints.get("tiny").ready_replicas, "the frozen replica is replaced")


async def test_a_replica_that_is_silent_for_a_while_stays_and_those_who_ask_meanwhile_are_answered(
    server: Server, model: Path
) -> None:
    told = await server.serve(model)
    pid = told["replicas"][0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    asking = complete(server, "hello")
    try:
        await until(lambda: replica_states(server) == ["silent"], "a probe of it has had no answer")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (await asking).json()["choices"][0]["text"] == "hello!"
    await until(server.context.endpoints.get("tiny").ready_replicas, "it is ready again")
    assert [replica.pid for replica in server.context.endpoints.get("tiny").ready_replicas()] == [pid]


async def test_a_stream_of_an_endpoint_that_is_stopped_ends_at_once_and_says_so(server: Server, model: Path) -> None:
    await server.serve(model)
    answer, lines = await first_event(server)
    began = time.monotonic()
    stopping = asyncio.ensure_future(server.ask("DELETE", "llmcloud/api/endpoints/tiny"))
    error = await last_error(answer, lines)
    assert time.monotonic() - began < 5
    assert error["code"] == "replica_lost" and "the endpoint was stopped" in error["message"]
    assert (await stopping).json()["state"] == "stopped"
    assert nothing_is_in_flight(server)


async def test_a_stream_that_its_replica_ends_without_a_word_is_told_as_broken_off(server: Server, model: Path) -> None:
    await server.serve(model)
    answer, lines = await first_event(server, "end after 3")
    assert "ended its answer before that was complete" in (await last_error(answer, lines))["message"]
    await until(lambda: nothing_is_in_flight(server), "the gauges are back at 0")


async def test_a_mistake_in_the_middle_of_a_stream_ends_it_with_an_error_event(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.serve(model)
    monkeypatch.setattr(UsageCut, "feed", lambda _, chunk: 1 / 0 if b'"2 "' in chunk else chunk)
    answer, lines = await first_event(server, "count 3")
    rest = [line async for line in lines if line]
    await answer.aclose()
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["code"] == "internal" and "ZeroDivisionError" in error["message"]
    assert nothing_is_in_flight(server)


async def test_a_stream_of_a_server_that_ends_is_told_that_it_restarts(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    answer, lines = await first_event(server)
    waiting = complete(server, "wait", key=key)
    await until(lambda: REGISTRY.get_sample_value("llmcloud_requests_in_flight") == 2, "both are being answered")
    await server.context.requests.close()
    assert (await last_error(answer, lines))["code"] == "server_restarting"
    refused = await waiting
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_restarting"
    assert refused.headers["retry-after"] == "5"
    assert nothing_is_in_flight(server)
    outcomes = {row["outcome"] for row in server.context.state.usage()}
    assert outcomes == {"server restarting"}
    await server.ask("DELETE", "llmcloud/api/endpoints/tiny")


async def test_a_request_after_a_replicas_death_waits_for_the_next_one(server: Server, model: Path) -> None:
    told = await server.serve(model)
    os.kill(told["replicas"][0]["pid"], signal.SIGKILL)
    answer = await server.complete("hello")
    assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "hello!")


async def test_who_has_less_patience_than_a_start_takes_is_refused_before_it_is_over(
    server: Server, model: Path
) -> None:
    told = await server.serve(model)
    (model / "slow").touch()
    os.kill(told["replicas"][0]["pid"], signal.SIGKILL)
    server.agent.processes[told["replicas"][0]["id"]].wait()
    began = time.monotonic()
    answer = await server.ask(
        "POST",
        "llmcloud/v1/completions",
        {"model": "tiny", "prompt": "hello"},
        headers={"X-Stainless-Read-Timeout": "3"},
    )
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_not_ready"
    assert 1.5 < time.monotonic() - began < 3
    assert int(answer.headers["Retry-After"]) >= 1


async def test_who_waits_for_a_replica_that_cannot_be_started_is_told_why(server: Server, model: Path) -> None:
    told = await server.serve(model)
    (model / "broken").touch()
    os.kill(told["replicas"][0]["pid"], signal.SIGKILL)
    answer = await server.complete("hello")
    assert answer.status_code == 503 and "another shape" in answer.json()["error"]["message"]
    later = await server.complete("hello")
    assert (later.status_code, later.json()["error"]["code"]) == (503, "model_failed")
    assert "another shape" in later.json()["error"]["message"]


async def failed_whose_end_waits(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[EndpointController, asyncio.Event]:
    """An endpoint that has failed, and what lets its replica end."""
    may_end, end = asyncio.Event(), ReplicaHost.stop

    async def stop(self: ReplicaHost, replica: Any) -> None:
        await may_end.wait()
        await end(self, replica)

    monkeypatch.setattr(ReplicaHost, "stop", stop)
    (model / "broken").touch()
    await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), "name": "tiny"})
    endpoint = server.context.endpoints.get("tiny")
    await until(lambda: endpoint.state == "failed", "it has failed")
    return endpoint, may_end


def kept_states(server: Server) -> list[str]:
    context = server.context
    return [row.state for row in context.state.endpoints(context.server_id)]


async def test_what_is_served_in_place_of_a_failed_endpoint_is_what_is_kept(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, may_end = await failed_whose_end_waits(server, model, monkeypatch)
    (model / "broken").unlink()
    serving = asyncio.ensure_future(server.serve(model))
    await asyncio.wait([serving], timeout=2.0)
    may_end.set()
    await serving
    await before.ended()
    assert kept_states(server) == ["ready"]


async def test_a_failed_endpoint_that_is_forgotten_does_not_come_back(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, may_end = await failed_whose_end_waits(server, model, monkeypatch)
    forgetting = asyncio.ensure_future(server.ask("DELETE", "llmcloud/api/endpoints/tiny"))
    await asyncio.wait([forgetting], timeout=1.0)
    may_end.set()
    assert (await forgetting).status_code == 200
    await before.ended()
    assert kept_states(server) == []


async def test_a_replica_on_another_host_is_reached_by_its_bridge_all_its_life(
    agent: StandInAgent, model: Path, own_root: Path
) -> None:
    (model / "slow").touch()
    context = make_context(agent)
    pool = await context.clusters.pool()
    pool.bridges = own_root.parent / "b"
    await context.started()
    endpoint = await context.endpoints.create(str(model), EndpointSpec(name="tiny"))
    await until(lambda: endpoint.stored.replicas and endpoint.stored.replicas[0].socket, "its process runs")
    [before] = endpoint.stored.replicas
    assert (Path(before.socket).parent, Path(before.home).parent) == (pool.bridges, agent.folder)
    found = await ReplicaHost(context.clusters.pool, context.clusters.agent).find(before)
    assert found == before  # what its agent calls it is no reason to leave the bridge
    lost = dataclasses.replace(before, socket="", home="", pid=0)  # of a server that ended before it had the answer
    assert await ReplicaHost(context.clusters.pool, context.clusters.agent).find(lost) == before
    (model / "slow").unlink()
    await endpoint.wait("starting", 20)
    [replica] = endpoint.ready_replicas()
    assert replica.stored == before
    await context.endpoints.stop("tiny")
    await context.close()


async def test_served_again_under_its_name_it_is_the_next_revision_and_the_first_one_is_remembered(
    agent: StandInAgent, model: Path
) -> None:
    context = make_context(agent)
    await context.started()
    await (await context.endpoints.create(str(model), EndpointSpec(name="tiny", replicas=2))).wait("starting", 20)
    await context.endpoints.stop("tiny")
    endpoint = await context.endpoints.create(str(model), EndpointSpec(name="tiny"))
    await endpoint.wait("starting", 20)
    [stored] = [row for row in context.state.endpoints(context.server_id)]
    assert [(r.number, r.role, r.num_replicas, r.weight) for r in stored.revisions] == [
        (1, "retired", 2, 0),
        (2, "stable", 1, 100),
    ]
    assert [replica.stored.revision for replica in endpoint.ready_replicas()] == [2]
    await context.endpoints.stop("tiny")
    await context.close()


# --- a full disk ---


def fill_disk(state: ServerState) -> None:
    """Leave the database no page to grow by."""
    [pages] = state._database.execute("PRAGMA page_count").fetchone()
    state._database.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        while True:
            state.add_audit("test", "fill", "x" * 100, "done", {})


def free_disk(state: ServerState) -> None:
    state._database.execute("PRAGMA max_page_count=1000000")


async def test_a_full_disk_keeps_no_endpoint_from_being_stopped_and_what_is_saved_later_is_true(
    server: Server, model: Path
) -> None:
    await server.serve(model)
    fill_disk(server.context.state)
    answer = await server.ask("DELETE", "llmcloud/api/endpoints/tiny")
    assert (answer.status_code, answer.json()["state"]) == (200, "stopped")
    assert all(process.poll() is not None for process in server.agent.processes.values())
    free_disk(server.context.state)

    def saved() -> list[str]:
        return [row.state for row in server.context.state.endpoints(server.context.server_id)]

    await until(lambda: saved() == ["stopped"], "it is saved when there is room again")


async def test_a_start_on_a_full_disk_leaves_an_endpoint_that_lives_and_no_ghost(server: Server, model: Path) -> None:
    await server.serve(model, "other")
    fill_disk(server.context.state)
    await server.serve(model)
    assert (await server.complete("hello")).status_code == 200
    free_disk(server.context.state)

    def saved() -> dict[str, str]:
        return {row.name: row.state for row in server.context.state.endpoints(server.context.server_id)}

    await until(lambda: saved().get("tiny") == "ready", "it is saved when there is room again")
    await server.context.requests.write()
    assert [row["outcome"] for row in server.context.state.usage()] == ["done"]
    server.context.audit.tell("test", "next", "x")
    actions = [row["action"] for row in server.context.state.audit(limit=20)]
    assert actions[0] == "next" and "endpoint.start" in actions  # the audit lacks nothing


async def test_a_key_that_cannot_be_kept_is_refused_with_the_reason(server: Server) -> None:
    fill_disk(server.context.state)
    answer = await server.ask("POST", "llmcloud/api/keys", {"scopes": ["models:read"], "label": "x" * 200})
    codes = {answer.status_code}
    while codes == {201}:  # until the last free page is used up
        answer = await server.ask("POST", "llmcloud/api/keys", {"scopes": ["models:read"], "label": "x" * 200})
        codes = {answer.status_code}
    assert codes == {500} and "disk is full" in answer.json()["message"]
    free_disk(server.context.state)
