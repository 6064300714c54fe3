"""One model after the other under one name, over REST, while somebody asks. Replicas are stand-ins."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.core.scheduling.priorities import Shortage
from jupyter_llmcloud.server.endpoints import registry
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
    assert all(replica["cluster"] for replica in before["replicas"])
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


async def test_changes_that_come_at_the_same_time_come_one_after_the_other(
    server: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether weights can be changed in place is looked up beside the loop, and meanwhile others may change things."""
    await server.serve(model)
    monkeypatch.setattr(registry, "difference", lambda *_: time.sleep(0.3) or "")
    better, best = make_model(tmp_path / "better"), make_model(tmp_path / "best")
    changes = [change(server, "update", {"target": str(folder)}) for folder in (better, best)]
    await asyncio.gather(*changes, change(server, "scale", {"replicas": 2}))
    stored = server.context.endpoints.get("tiny").stored
    assert [item.number for item in stored.revisions] == [1, 2, 3]
    assert {item.model for item in stored.revisions} == {str(model), str(better), str(best)}
    assert stored.current.num_replicas == 2
    await asyncio.gather(change(server, "rollback", {}), change(server, "scale", {"replicas": 1}))
    assert (stored.current.number, stored.revisions[-1].num_replicas) == (2, 1)


async def test_a_model_that_generates_no_text_does_not_take_the_place_of_one_that_does(
    server: Server, model: Path, tmp_path: Path
) -> None:
    await server.serve(model)
    folder = make_model(tmp_path / "film")
    (folder / "config.json").write_text('{"architectures": ["BertForSequenceClassification"], "hidden_size": 7}')
    said = f"endpoint 'tiny' generates text, and {folder} classifies texts"
    for verb, body in (
        ("update", {"target": str(folder)}),
        ("update", {"target": str(folder), "canary": 20}),
        ("shadow", {"revision": str(folder)}),
    ):
        refused = await change(server, verb, body, 400)
        assert said in refused["message"] and "name of its own" in refused["message"]
    assert await roles(server) == {1: "stable"}
    assert await revision(server) == "1"


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


async def test_a_rollback_to_replicas_that_were_kept_starts_nothing_and_their_time_ends(
    server: Server, model: Path, tmp_path: Path
) -> None:
    """The same shape: without --keep-previous the weights would be changed in place."""
    first = await server.serve(model, keep_previous="50m")
    await change(server, "update", {"target": str(make_model(tmp_path / "better"))})
    await until(lambda: _is_revision(server, "2"), "the new one answers")
    assert await roles(server) == {1: "previous", 2: "stable"}
    await change(server, "rollback", {})
    assert await revision(server) == "1"  # at once
    assert first["replicas"][0]["pid"] in [replica["pid"] for replica in (await told(server))["replicas"]]
    assert len(server.agent.processes) == 2
    await change(server, "update", {"target": str(make_model(tmp_path / "third"))})
    await until(lambda: _is_revision(server, "3"), "the third one answers")
    kept = server.context.endpoints.get("tiny").stored.revisions
    assert next(item for item in kept if item.role == "previous").number == 1
    server.context.endpoints.get("tiny").stored.revisions = [
        dataclasses.replace(item, kept_until=item.kept_until and 1.0) for item in kept
    ]

    async def one_is_left() -> bool:
        return [replica["revision"] for replica in (await told(server))["replicas"]] == [3]

    await until(one_is_left, "its time is over")
    assert (await roles(server))[1] == "retired"


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

    async def is_compared() -> bool:
        assert await revision(server, temperature=0) == "1"
        return bool((await shadow())["comparison"]["num_comparable"])

    await until(is_compared, "greedy answers are compared")
    compared = (await shadow())["comparison"]
    assert (compared["equal_share"], compared["error_share"], compared["stable_error_share"]) == (1.0, 0.0, 0.0)
    assert compared["latency_ratio"] > 0 and compared["num_compared"] >= compared["num_comparable"]
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


async def test_an_adapter_that_a_new_model_cannot_take_is_not_listed_until_there_is_one_that_can(
    server: Server, model: Path, tmp_path: Path
) -> None:
    await server.serve(model)
    folder = tmp_path / "legal"
    folder.mkdir()
    base = {"base_model_name_or_path": str(model), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(base))
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    await change(server, "adapters", {"target": str(folder)}, 201)
    key = await server.key("infer:tiny", "models:read")

    async def listed() -> list[str]:
        rows = (await server.ask("GET", "llmcloud/v1/models", key=key)).json()["data"]
        return [row["id"] for row in rows]

    assert await listed() == ["tiny", "tiny:legal"]
    other = make_model(tmp_path / "other", "keeps", "no adapters")
    await change(server, "update", {"target": str(other)})

    async def is_without() -> bool:
        return await listed() == ["tiny"]

    await until(is_without, "the new model answers, without the adapter")
    await change(server, "rollback", {})

    async def is_with() -> bool:
        return await listed() == ["tiny", "tiny:legal"]

    await until(is_with, "the model before answers again, with the adapter")


async def test_adapters_come_and_go_while_it_answers(server: Server, model: Path, tmp_path: Path) -> None:
    await server.serve(model)
    folder = make_adapter(tmp_path / "legal", model)
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


def make_adapter(folder: Path, model: Path) -> Path:
    """One of PEFT."""
    folder.mkdir()
    about = {"base_model_name_or_path": str(model), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


async def test_a_replica_that_was_being_loaded_has_the_adapters_that_came_meanwhile_and_not_those_that_went(
    server: Server, model: Path, tmp_path: Path
) -> None:
    (model / "slow").touch()
    asked = await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), "name": "tiny"})
    assert asked.status_code == 201
    await until(lambda: server.agent.processes, "the replica is started")
    for name in ("legal", "medical"):
        await change(server, "adapters", {"target": str(make_adapter(tmp_path / name, model))}, 201)
    await server.ask("DELETE", "llmcloud/api/endpoints/tiny/adapters/legal")
    (model / "slow").unlink()
    assert (await server.ask("GET", "llmcloud/api/endpoints/tiny?wait_s=20")).json()["state"] == "ready"
    assert (await server.stats())["adapters"] == ["medical"]
    (model / "slow").touch()
    await change(server, "scale", {"replicas": 2})
    await until(lambda: len(server.agent.processes) == 2, "another one is started")
    await change(server, "adapters", {"target": str(tmp_path / "legal")}, 201)
    await server.ask("DELETE", "llmcloud/api/endpoints/tiny/adapters/medical")
    (model / "slow").unlink()
    endpoint = server.context.endpoints.get("tiny")
    await until(lambda: len(endpoint.ready_replicas()) == 2, "both are ready")
    for replica in endpoint.ready_replicas():
        async with replica.session.get("/stats") as response:
            assert (await response.json())["adapters"] == ["legal"]


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


async def test_a_replica_that_was_ended_for_its_memory_is_replaced_and_it_is_said(server: Server, model: Path) -> None:
    """The agent keeps the limit (tests/agent/test_memory_limit.py); here it says that it did."""
    name = (await server.serve(model, memory="1GiB"))["replicas"][0]["id"]
    reason = "it took 1.2 GiB of memory, and --memory allows 1GiB: it was ended"
    server.pool.agent.reasons[name] = reason
    server.pool.agent.processes[name].kill()

    async def is_replaced() -> bool:
        replicas = (await told(server))["replicas"]
        return [row["state"] for row in replicas] == ["ready"] and replicas[0]["id"] != name

    await until(is_replaced, "the replica is replaced")
    [lost] = audit(server, "endpoint.replica_lost")
    assert lost["detail"] == {"replica": name, "reason": f"replica {name}: {reason}"}


async def test_what_no_host_can_hold_is_refused_for_good(server: Server, model: Path) -> None:
    server.pool.never = "no host of the cluster can hold a replica: --devices 2: here has no GPU."
    await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), "name": "tiny", "devices": 2})
    now = (await server.ask("GET", "llmcloud/api/endpoints/tiny?wait_s=20")).json()
    assert now["state"] == "failed" and now["reason"] == server.pool.never


async def test_an_autoscaled_endpoint_gives_slots_back_to_a_run_of_higher_priority(server: Server, model: Path) -> None:
    await server.serve(model, replicas="1:3", cores=1)
    endpoint = server.context.endpoints.get("tiny")
    endpoint.scale(3)

    async def has(number: int) -> bool:
        return [row["state"] for row in (await told(server))["replicas"]] == ["ready"] * number

    await until(lambda: has(3), "it has three replicas")
    held = {row["id"]: 1 for row in (await told(server))["replicas"]}
    pool = await server.context.clusters.pool()
    pool.on_shortage(Shortage("local", 2, 0, held))
    assert (await told(server))["num_replicas"] == 3  # of equal priority: who is there first stays
    pool.on_shortage(Shortage("local", 2, 1, held))
    await until(lambda: has(1), "it has given two back")
    assert audit(server, "endpoint.scaled")[0]["detail"] == {"replicas": 1, "before": 3}
    assert endpoint.scaling.most(asyncio.get_running_loop().time()) == 1  # it does not grow while the run waits
    assert (await server.complete("hello")).status_code == 200
