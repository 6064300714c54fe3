"""One model after the other under one name, over REST, while somebody asks. Replicas are stand-ins."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.server_parts import Server, make_model, until

pytest_plugins = ["tests.support.server_fixtures"]


async def change(server: Server, verb: str, body: Any, status: int = 200, name: str = "tiny") -> dict[str, Any]:
    answer = await server.ask("POST", f"llmcloud/api/endpoints/{name}/{verb}", body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def told(server: Server, name: str = "tiny") -> dict[str, Any]:
    return (await server.ask("GET", f"llmcloud/api/endpoints/{name}")).json()


async def revision(server: Server, **body: Any) -> str:
    answer = await server.complete("hello", **body)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-llmcloud-revision"]


async def roles(server: Server) -> dict[int, str]:
    return {row["number"]: row["role"] for row in (await told(server))["revisions"]}


def other_config(folder: Path) -> Path:
    """A model of another shape."""
    (make_model(folder) / "config.json").write_text('{"hidden_size": 7}')
    return folder


def audit(server: Server, action: str) -> list[dict[str, Any]]:
    return [row for row in server.context.state.audit() if row["action"] == action]


async def test_weights_of_the_same_shape_are_taken_by_the_replicas_that_there_are(
    server: Server, model: Path, tmp_path: Path
) -> None:
    await server.serve(model, replicas=2)

    async def both_are_ready() -> bool:
        return [replica["state"] for replica in (await told(server))["replicas"]] == ["ready", "ready"]

    await until(both_are_ready, "both are ready: one that still starts would be started again")
    before = await told(server)
    assert await revision(server) == "1"
    await change(server, "update", {"target": str(make_model(tmp_path / "better"))})

    async def all_have_it() -> bool:
        return {replica["revision"] for replica in (await told(server))["replicas"]} == {2}

    await until(all_have_it, "both have the other weights")
    after = await told(server)
    assert {replica["pid"] for replica in after["replicas"]} == {replica["pid"] for replica in before["replicas"]}
    assert after["state"] == "ready" and after["target"] == str(tmp_path / "better")
    assert await revision(server) == "2"
    await change(server, "rollback", {})
    await until(lambda: _is_revision(server, "1"), "it is back")
    assert len(server.agent.processes) == 2  # nothing was started for any of it


async def _is_revision(server: Server, number: str) -> bool:
    return await revision(server) == number


@pytest.mark.parametrize("how", ["another shape", "does not fit"])
async def test_another_model_has_replicas_of_its_own_before_the_old_ones_go_and_nobody_is_refused(
    server: Server, model: Path, tmp_path: Path, how: str
) -> None:
    await server.serve(model, replicas=2)
    folder = other_config(tmp_path / "wide") if how == "another shape" else make_model(tmp_path / "wide", "keeps")
    statuses: Counter[int] = Counter()
    revisions: list[str] = []

    async def ask_until_new() -> None:
        while revisions[-5:] != ["2"] * 5:
            answer = await server.complete("hello")
            statuses[answer.status_code] += 1
            revisions.append(answer.headers["x-llmcloud-revision"])
            await asyncio.sleep(0.01)

    asking = asyncio.ensure_future(ask_until_new())
    await change(server, "update", {"target": str(folder)})
    async with asyncio.timeout(30):
        await asking
    assert set(statuses) == {200} and revisions[0] == "1"

    async def two_are_left() -> bool:
        return [replica["revision"] for replica in (await told(server))["replicas"]] == [2, 2]

    await until(two_are_left, "the old ones are gone")
    assert len(server.agent.processes) == 4


async def test_a_canary_gets_its_share_by_key_and_a_split_changes_that(
    server: Server, model: Path, tmp_path: Path
) -> None:
    await server.serve(model)
    await change(server, "update", {"target": str(make_model(tmp_path / "canary")), "canary": 20})
    await until(lambda: _has_roles(server, {1: "stable", 2: "canary"}), "there is a canary")
    users = [f"user-{number}" for number in range(40)]

    async def shares() -> Counter[str]:
        return Counter([await revision(server, user=user) for user in users])

    await until(lambda: _asked(shares, "2"), "the canary answers")
    first = {user: await revision(server, user=user) for user in users}
    assert first == {user: await revision(server, user=user) for user in users}
    assert 1 <= list(first.values()).count("2") <= 20
    await change(server, "split", {"shares": {"stable": 0, "canary": 100}})
    await until(lambda: _has_roles(server, {1: "retired", 2: "stable"}), "it has everything")
    assert set(await shares()) == {"2"}
    for shares_ in ({"stable": 50}, {"stable": 50, "7": 50}):
        refused = await change(server, "split", {"shares": shares_}, 400)
        assert refused["error"] == "UsageError"


async def _has_roles(server: Server, wanted: dict[int, str]) -> bool:
    return await roles(server) == wanted


async def _asked(shares: Any, wanted: str) -> bool:
    return wanted in await shares()


async def test_a_canary_that_fails_its_requests_is_rolled_back_by_itself_and_says_why(
    server: Server, model: Path, tmp_path: Path
) -> None:
    await server.serve(model)
    await change(server, "update", {"target": str(make_model(tmp_path / "bad", "failing")), "canary": 50})
    statuses: Counter[int] = Counter()
    for number in range(400):
        statuses[(await server.complete("hello", user=f"user-{number}")).status_code] += 1
        if (await roles(server)).get(2) == "retired":
            break
        await asyncio.sleep(0.01)
    assert await roles(server) == {1: "stable", 2: "retired"}
    [row] = [row for row in (await told(server))["revisions"] if row["number"] == 2]
    assert "requests failed" in row["note"]
    [record] = audit(server, "endpoint.rollback")
    assert record["detail"] == {"revision": 2, "reason": row["note"]} and record["actor"] == "server"
    assert 3 <= statuses[500] <= 10
    assert {await revision(server, user=f"user-{number}") for number in range(20)} == {"1"}


@pytest.mark.parametrize("canary", [10, None])
async def test_what_cannot_be_loaded_is_rolled_back_by_itself_while_the_one_before_it_answers(
    server: Server, model: Path, tmp_path: Path, canary: int | None
) -> None:
    await server.serve(model)
    (make_model(tmp_path / "bad", "broken") / "config.json").write_text('{"hidden_size": 7}')
    await change(server, "update", {"target": str(tmp_path / "bad"), "canary": canary})
    await until(lambda: _has_roles(server, {1: "stable", 2: "retired"}), "it is withdrawn")
    now = await told(server)
    assert now["state"] == "ready" and "another shape" in now["revisions"][1]["note"]
    assert "another shape" in audit(server, "endpoint.rollback")[0]["detail"]["reason"]
    assert {await revision(server, user=f"user-{number}") for number in range(10)} == {"1"}
    assert now["model"] == str(model)


async def test_a_shadow_is_asked_the_same_and_nobody_hears_its_answer(
    server: Server, model: Path, tmp_path: Path
) -> None:
    await server.serve(model)
    await change(server, "shadow", {"revision": str(make_model(tmp_path / "shadow"))})

    async def shadow() -> dict[str, Any]:
        return next(row for row in (await told(server))["revisions"] if row["role"] == "shadow")

    async def is_copied() -> bool:
        assert await revision(server) == "1"
        return bool((await shadow())["num_requests"])

    await until(is_copied, "requests are copied")
    assert (await shadow())["num_errors"] == 0
    await change(server, "shadow", {"revision": None})
    await until(lambda: _has_roles(server, {1: "stable", 2: "retired"}), "it is over")
    assert "revision" in (await change(server, "shadow", {"revision": "stable"}, 400))["message"]


async def test_more_and_fewer_replicas_and_bounds(server: Server, model: Path) -> None:
    await server.serve(model)
    await change(server, "scale", {"replicas": 3})

    async def number(wanted: int) -> bool:
        return [row["state"] for row in (await told(server))["replicas"]] == ["ready"] * wanted

    await until(lambda: number(3), "three are ready")
    now = await change(server, "scale", {"replicas": "1:2"})
    assert (now["num_replicas"], now["min_replicas"], now["max_replicas"]) == (2, 1, 2)
    await until(lambda: number(2), "two are left")
    for wrong in (0, 65, "4:2", "0:0", "many", True):
        refused = await change(server, "scale", {"replicas": wrong}, 400)
        assert refused["error"] == "UsageError", wrong
    assert (await change(server, "scale", {"replicas": 2}, 404, "nothing"))["error"] == "NotFound"


async def test_an_endpoint_without_replicas_starts_one_for_who_waits_and_tells_who_does_not(
    server: Server, model: Path
) -> None:
    await server.serve(model, replicas="0:2")
    endpoint = server.context.endpoints.get("tiny")
    assert endpoint.stored.start_s is not None
    endpoint.scale(0)
    await until(lambda: not endpoint.describe()["replicas"], "none is left")
    now = await told(server)
    assert (now["state"], now["num_replicas"]) == ("ready", 0) and "next request" in now["reason"]
    endpoint.stored.start_s = 12.0
    body, patience = {"model": "tiny", "prompt": "hello"}, {"X-Stainless-Read-Timeout": "3"}
    refused = await server.ask("POST", "llmcloud/v1/completions", body, headers=patience)
    assert refused.status_code == 503 and 10 <= int(refused.headers["Retry-After"]) <= 12
    assert (await server.complete("hello")).status_code == 200  # it waits: the replica was started by the first one


async def test_adapters_come_and_go_while_it_answers(server: Server, model: Path, tmp_path: Path) -> None:
    await server.serve(model)
    folder = tmp_path / "legal"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(model), "peft_type": "LORA"})
    )
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    now = await change(server, "adapters", {"target": str(folder)}, 201)
    assert now["adapters"] == ["legal"]
    key = await server.key("infer:tiny", "models:read")
    for name in ("tiny:legal", "legal"):
        assert (await server.complete("hello", key, model=name)).json()["choices"][0]["text"] == "hello!"
    listed = (await server.ask("GET", "llmcloud/v1/models", key=key)).json()["data"]
    assert [row["id"] for row in listed] == ["tiny", "tiny:legal"]
    assert (await server.ask("GET", "llmcloud/v1/models/legal", key=key)).json()["id"] == "tiny:legal"
    assert (await server.complete("hello", model="tiny:other")).status_code == 404
    pid = now["replicas"][0]["pid"]
    os.kill(pid, signal.SIGKILL)

    async def is_replaced() -> bool:
        replicas = (await told(server))["replicas"]
        return bool(replicas) and replicas[0]["pid"] != pid and replicas[0]["state"] == "ready"

    await until(is_replaced, "the replica is replaced")
    assert (await server.complete("hello", model="legal")).status_code == 200
    gone = await server.ask("DELETE", "llmcloud/api/endpoints/tiny/adapters/legal")
    assert gone.json()["adapters"] == []
    assert (await server.complete("hello", model="legal")).status_code == 404
    assert (await change(server, "adapters", {"target": str(model)}, 422))["error"] == "ModelError"
    assert (await server.ask("DELETE", "llmcloud/api/endpoints/tiny/adapters/legal")).status_code == 404


async def test_a_replica_without_room_waits_says_why_and_is_served_when_there_is_some(
    server: Server, model: Path
) -> None:
    server.pool.no_room = "--cores 2: 1 of the 2 cores of here are free (1 have ranks, 0 other replicas)"
    options = {"cores": 2, "memory": "1GiB", "kv_cache": "64MiB", "devices": 0}
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), "name": "tiny", **options})
    assert answer.status_code == 201

    async def waits() -> bool:
        now = await told(server)
        return now["state"] == "starting" and now["reason"].startswith("waits for room: --cores 2")

    await until(waits, "it says why it waits")
    server.pool.no_room = ""
    now = (await server.ask("GET", "llmcloud/api/endpoints/tiny?wait_s=20")).json()
    assert (now["state"], now["reason"]) == ("ready", "")
    stated = {name: now[name] for name in ("cores", "memory_bytes", "cache_bytes", "devices")}
    assert stated == {"cores": 2, "memory_bytes": 1 << 30, "cache_bytes": 64 << 20, "devices": 0}
