"""The JSON routes: clusters, placement, runs, endpoints, keys; their errors; what the audit tells."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jupyter_llmcloud.server.audit import SCHEMA_ID
from jupyter_llmcloud.storage import log_text
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.layouts import Layouts
from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from tests.support.plain_http import PLAIN
from tests.support.server_parts import Server, make_model, until

pytest_plugins = ["tests.support.server_fixtures"]


def refusal(answer: Any, status: int, error: str) -> str:
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert set(told) == {"error", "message"} and told["error"] == error
    return str(told["message"])


def make_run(name: str = "train", state: str = "finished", **fields: Any) -> RunRecord:
    record = RunRecord(f"{name}-1", name, state, created=1.0, world_size=2, ranks=[0, 1], cluster="local", **fields)
    folder = RunStore().folder(record.run_id)
    folder.create(record, "print(1)\n")
    metrics = JournalWriter(folder.metrics(0))
    metrics.append([{"step": step, "values": {"loss": 1 / (step + 1)}} for step in range(3)])
    metrics.append([{"progress": [3, 10], "desc": "training"}])
    metrics.close()
    for rank in record.ranks:
        logs = JournalWriter(folder.logs(rank))
        logs.append([{"kind": "stdout", "text": f"line {line} of rank {rank}\n"} for line in range(5)])
        logs.close()
    return record


async def test_the_status_says_whose_server_it_is(server: Server, own_root: Path) -> None:
    told = (await server.ask("GET", "llmcloud/api/status")).json()
    assert told["headless"] is False and told["root"] == str(own_root.resolve())


async def test_a_cluster_is_started_scaled_and_stopped(server: Server) -> None:
    started = await server.ask("POST", "llmcloud/api/clusters", {"kind": "local", "name": "c1", "workers": 2})
    assert started.status_code == 201 and started.json()["num_workers"] == 2
    assert "private" not in started.text
    assert (await server.ask("POST", "llmcloud/api/clusters/c1/scale", {"workers": 3})).json()["num_workers"] == 3
    listed = await server.ask("GET", "llmcloud/api/clusters")
    assert [row["name"] for row in listed.json()["clusters"]] == ["c1"] and "private" not in listed.text
    assert (await server.ask("DELETE", "llmcloud/api/clusters/c1")).json()["state"] == "stopped"
    assert (await server.ask("GET", "llmcloud/api/clusters")).json()["clusters"] == []


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("clusters", {"kind": 3}, "kind must be str"),
        ("clusters", {"workers": "2"}, "workers must be int"),
        ("clusters", {"workers": True}, "workers must be int"),
        ("clusters", {"name": "../x"}, "not a valid name"),
        ("clusters", {"colour": 1}, "'colour' is not known"),
        ("clusters", {"address": "tcp://x", "workers": 2}, "address and name alone"),
        ("placement", {"num_ranks": 0}, "num_ranks 0 is not possible: at least 1."),
        ("placement", {"ticket": 3}, "ticket must be str"),
        ("placement", {"ticket": "x" * 65}, "64 at most"),
        ("endpoints", {}, "target must be str"),
        ("endpoints", {"target": "x\0y"}, "neither a run nor a folder"),
        ("preparations", {"out": "/tmp/x"}, "source must be list"),
        ("preparations", {"source": ["/no/such/file"]}, "where should the prepared data go"),
        ("preparations", {"source": ["/"], "out": "/x", "dedup": "some"}, "none, exact, near"),
        ("preparations", {"source": ["/"], "out": "/x", "steps": "stripp"}, "Did you mean strip"),
        ("preparations", {"source": ["/"], "out": "/x", "code": {"content": "é"}}, "is no base64"),
        ("keys", {"scopes": "infer:*"}, "scopes must be list"),
        ("keys", {"scopes": ["admin"]}, "'admin' does not exist"),
        ("keys", {"scopes": []}, "at least one scope"),
        ("keys", {"scopes": ["models:read"], "expires_s": 0}, "expires_s 0 is not possible"),
    ],
)
async def test_a_wrong_field_is_refused_by_name(server: Server, path: str, body: Any, says: str) -> None:
    assert says in refusal(await server.ask("POST", f"llmcloud/api/{path}", body), 400, "UsageError")


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_no_json_object_is_refused(server: Server, content: bytes) -> None:
    headers = {"Authorization": f"token {server.token}"}
    answer = await server.client.post(f"{server.url}/llmcloud/api/keys", content=content, headers=headers)
    refusal(answer, 400, "UsageError")


async def test_ranks_are_placed_or_it_is_said_why_not(server: Server) -> None:
    assert (await server.ask("POST", "llmcloud/api/placement", {"num_ranks": 2})).json()["num_ranks"] == 2
    assert "4 ranks" in refusal(
        await server.ask("POST", "llmcloud/api/placement", {"num_ranks": 9}), 409, "CapacityError"
    )


async def test_to_wait_for_slots_is_no_error_unless_something_is_ended_for_them(server: Server) -> None:
    server.pool.free = 1
    path, waits = "llmcloud/api/placement", {"num_ranks": 2, "ticket": "mine"}
    before = len(server.context.state.audit())
    answer = await server.ask("POST", path, waits)
    assert (answer.status_code, answer.json()["state"]) == (202, "waiting")
    assert "1 of 4 slots" in answer.json()["reason"]
    assert len(server.context.state.audit()) == before
    refusal(await server.ask("POST", path, {"num_ranks": 2}), 409, "Busy")
    refusal(await server.ask("POST", path, {**waits, "replaces": "abc123"}), 409, "Busy")
    refusal(await server.ask("POST", path, {"num_ranks": 2, "replaces": "abc123"}), 400, "UsageError")


async def test_worlds_are_listed_and_ended_by_id_or_notebook_without_an_absolute_path(server: Server) -> None:
    [world] = (await server.ask("GET", "llmcloud/api/worlds")).json()["worlds"]
    assert (world["world_id"], world["holder"], world["num_ranks"]) == ("abc123", "project/a.ipynb", 2)
    assert "/home" not in json.dumps(world)
    assert (await server.ask("DELETE", "llmcloud/api/worlds/project%2Fa.ipynb")).json()["world_id"] == "abc123"
    refusal(await server.ask("DELETE", "llmcloud/api/worlds/b.ipynb"), 404, "NotFound")


async def test_runs_are_listed_with_their_progress_and_last_values(server: Server) -> None:
    make_run()
    [run] = (await server.ask("GET", "llmcloud/api/runs")).json()["runs"]
    assert (run["name"], run["state"], run["progress"]) == ("train", "finished", [3, 10])
    assert run["metrics"] == {"loss": pytest.approx(1 / 3)}
    told = (await server.ask("GET", "llmcloud/api/runs/train")).json()
    assert told["run_id"] == "train-1" and told["source"] == "print(1)\n"


async def test_what_json_has_no_number_for_is_null_and_said_beside_it(server: Server) -> None:
    record = make_run(not_finite={"loss": {"count": 1, "first": 3, "since": 3}})
    metrics = JournalWriter(RunStore().folder(record.run_id).metrics(0))
    metrics.append([{"step": 3, "values": {"loss": math.nan, "up": math.inf, "lr": 0.1}}])
    metrics.close()

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    for path in ("runs", "runs/train", "runs/train/metrics"):
        answer = await server.ask("GET", f"llmcloud/api/{path}")
        told = json.loads(answer.text, parse_constant=refuse)
    assert told["records"][-1]["values"] == {"loss": None, "up": None, "lr": 0.1}
    assert told["records"][-1]["not_finite"] == {"loss": "nan", "up": "inf"}
    run = (await server.ask("GET", "llmcloud/api/runs/train")).json()
    assert run["metrics"] == {"loss": None, "up": None, "lr": 0.1}
    assert run["not_finite"] == {"loss": {"count": 1, "first": 3, "since": 3, "value": "nan"}}


async def test_a_run_can_be_looked_at_and_remembers_its_log_scales(server: Server) -> None:
    make_run()
    told = (await server.ask("PUT", "llmcloud/api/runs/train/view", {"log": ["loss"]})).json()
    assert told == {"log": ["loss"]} and RunStore().find("train").log_scales() == ["loss"]
    layouts = Layouts(RunStore().path.parent)
    await server.ask("PUT", "llmcloud/api/runs/train/view", {"log": [], "layout": {"axis": "time"}})
    assert (layouts.find("train"), layouts.find("other")) == ({"axis": "time"}, None)
    await server.ask("PUT", "llmcloud/api/runs/train/view", {"log": ["loss"]})
    assert layouts.find("train") == {"axis": "time"}
    await server.ask("PUT", "llmcloud/api/runs/train/view", {"log": ["loss"], "layout": {}})
    assert layouts.find("train") is None
    view = (await server.ask("GET", "llmcloud/api/runs/train/view")).json()
    assert (view["run_id"], view["name"], view["state"]) == ("train-1", "train", "finished")
    assert "loss" in view["html"] and "<img" in view["html"]
    refusal(await server.ask("PUT", "llmcloud/api/runs/train/view", {"log": [3]}), 400, "UsageError")
    refusal(await server.ask("GET", "llmcloud/api/runs/none/view"), 404, "NotFound")


async def test_the_newest_logs_of_a_rank_are_told(server: Server) -> None:
    make_run()
    rows = (await server.ask("GET", "llmcloud/api/runs/train/logs?rank=1&limit=2")).json()["records"]
    assert [row["text"] for row in rows] == ["line 3 of rank 1\n", "line 4 of rank 1\n"]
    assert len((await server.ask("GET", "llmcloud/api/runs/train/metrics")).json()["records"]) == 4
    assert "rank='x'" in refusal(await server.ask("GET", "llmcloud/api/runs/train/logs?rank=x"), 400, "UsageError")


async def test_all_that_a_run_has_written_is_text_and_never_a_page(server: Server) -> None:
    record = make_run()
    hostile = "<script>alert(1)</script> \N{SNOWMAN} \ud800\n"
    for rank in record.ranks:
        logs = JournalWriter(RunStore().folder(record.run_id).logs(rank))
        logs.append([{"kind": "stdout", "text": f"{n} {'x' * 60}\n"} for n in range(20_000)])
        logs.append([{"kind": "stderr", "text": hostile}])
        logs.close()
    answer = await server.ask("GET", "llmcloud/api/runs/train/log")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Transfer-Encoding"] == "chunked"
    lines = answer.content.decode().splitlines()
    assert [line for line in lines if line.startswith("[1]")] == [
        *(f"[1] line {n} of rank 1" for n in range(5)),
        *(f"[1] {n} {'x' * 60}" for n in range(20_000)),
        "[1] <script>alert(1)</script> \N{SNOWMAN} ?",
    ]
    only = await server.ask("GET", "llmcloud/api/runs/train-1/log?rank=0")
    assert {line[:4] for line in only.text.splitlines()} == {"[0] "}
    refusal(await server.ask("GET", "llmcloud/api/runs/nothing/log"), 404, "NotFound")


async def test_a_log_is_read_no_further_than_somebody_reads_it(server: Server, monkeypatch: Any, caplog: Any) -> None:
    make_run()
    told, closed = 0, asyncio.Event()

    def endless(*_: Any) -> Iterator[bytes]:
        nonlocal told
        try:
            while True:
                told += 1
                yield b"x" * (1 << 17)
        finally:
            closed.set()

    monkeypatch.setattr(log_text, "pieces", endless)
    headers = {"Authorization": f"token {server.token}"}
    async with server.client.stream("GET", f"{server.url}/llmcloud/api/runs/train/log", headers=headers) as answer:
        chunks = answer.aiter_raw()
        await anext(chunks)
        before = -1
        while before != told:  # until what lies between the two ends is full
            before = told
            await asyncio.sleep(0.2)
        assert told < 500 and not closed.is_set()
    await asyncio.wait_for(closed.wait(), 20)
    assert "Traceback" not in caplog.text and "Uncaught" not in caplog.text


async def test_a_link_in_a_notebook_opens_the_log_for_who_is_signed_in(server: Server) -> None:
    """A browser that follows a link sends its cookie, no token and, being told so by the link, no referrer."""
    make_run()
    async with httpx.AsyncClient(trust_env=False, verify=PLAIN) as browser:
        url = f"{server.url}/llmcloud/api/runs/train-1/log"
        assert (await browser.get(url)).status_code == 403
        await browser.get(f"{server.url}/llmcloud/api/status?token={server.token}")
        answer = await browser.get(url)
        assert answer.status_code == 200 and "[1] line 4 of rank 1" in answer.text


async def test_an_active_run_is_stopped_through_its_agent(server: Server) -> None:
    record = make_run(state="running", agent=server.agent.address)
    [run] = (await server.ask("GET", "llmcloud/api/runs?state=active")).json()["runs"]
    assert run["state"] == "running"
    assert (await server.ask("POST", "llmcloud/api/runs/train/stop", {})).json() == {"state": "stopping"}
    assert server.agent.stopped_runs == [record.run_id]


async def test_an_active_run_whose_agent_is_gone_is_lost(server: Server, own_root: Path) -> None:
    make_run(state="running", agent=str(own_root / "gone.sock"))
    assert (await server.ask("GET", "llmcloud/api/runs")).json()["runs"][0]["state"] == "lost"
    assert (await server.ask("GET", "llmcloud/api/runs?state=active")).json()["runs"] == []
    assert "it is lost" in refusal(await server.ask("POST", "llmcloud/api/runs/train/stop", {}), 400, "UsageError")


async def test_a_run_that_has_ended_can_be_deleted_and_not_stopped(server: Server) -> None:
    make_run()
    assert "is not active" in refusal(await server.ask("POST", "llmcloud/api/runs/train/stop", {}), 400, "UsageError")
    assert (await server.ask("DELETE", "llmcloud/api/runs/train")).json() == {"run_id": "train-1"}
    refusal(await server.ask("GET", "llmcloud/api/runs/train"), 404, "NotFound")


async def test_an_endpoint_serves_the_model_of_a_run(server: Server) -> None:
    record = make_run("poet")
    make_model(RunStore().folder(record.run_id).model)
    told = await server.ask("POST", "llmcloud/api/endpoints", {"target": "poet"})
    assert told.json()["name"] == "poet" and told.json()["state"] == "starting"
    assert told.json()["url"] == f"{server.url}/llmcloud/v1"
    ready = (await server.ask("GET", "llmcloud/api/endpoints/poet?wait_s=20")).json()
    assert ready["state"] == "ready" and len(ready["revision"]) == 12
    assert [set(replica) for replica in ready["replicas"]] == [
        {"cluster", "id", "pid", "state", "in_flight", "revision"}
    ]
    [replica] = server.context.endpoints.get("poet").stored.replicas
    assert replica.token and replica.token not in json.dumps(ready) and '"token"' not in json.dumps(ready)


async def test_a_run_that_saved_nothing_cannot_be_served(server: Server) -> None:
    make_run("poet")
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": "poet"})
    assert "--save model,tokenizer" in refusal(answer, 422, "ModelError")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pytorch_model.bin is not",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 20), "not a safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a safetensors file"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors"}}'
            ),
            "b.safetensors",
        ),
    ],
)
async def test_a_folder_that_holds_no_model_is_refused_before_anything_starts(
    server: Server, model: Path, spoil: Any, says: str
) -> None:
    spoil(model)
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model)})
    assert says in refusal(answer, 422, "ModelError")
    assert server.agent.processes == {}
    assert (await server.ask("GET", "llmcloud/api/endpoints")).json()["endpoints"] == []


async def test_what_is_neither_run_nor_folder_is_not_found(server: Server) -> None:
    for target in ("nothing", "/no/such/folder", "../../etc"):
        refusal(await server.ask("POST", "llmcloud/api/endpoints", {"target": target}), 404, "NotFound")


async def test_a_name_that_is_taken_is_refused_and_free_again_when_stopped(server: Server, model: Path) -> None:
    await server.serve(model)
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), "name": "tiny"})
    assert "--name" in refusal(answer, 409, "NameTaken")
    assert (await server.ask("DELETE", "llmcloud/api/endpoints/tiny")).json()["state"] == "stopped"
    assert all(process.poll() is not None for process in server.agent.processes.values())
    await server.serve(model)
    await server.ask("DELETE", "llmcloud/api/endpoints/tiny")
    await server.ask("DELETE", "llmcloud/api/endpoints/tiny")
    assert (await server.ask("GET", "llmcloud/api/endpoints")).json()["endpoints"] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("replicas", 0),
        ("replicas", 65),
        ("dtype", "int7"),
        ("engine", "steam"),
        ("name", "a b"),
        ("max_model_len", 0),
        ("max_concurrent", 0),
        ("threads", -1),
    ],
)
async def test_an_option_that_is_not_possible_is_refused(server: Server, model: Path, field: str, value: Any) -> None:
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), field: value})
    assert str(value) in refusal(answer, 400, "UsageError")


async def test_the_limits_of_an_endpoint_reach_its_replicas_and_what_they_take_is_told(
    server: Server, model: Path
) -> None:
    limits = {"max_model_len": 512, "max_concurrent": 4, "threads": 3, "engine": "generate"}
    await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), "name": "tiny", **limits})
    told = (await server.ask("GET", "llmcloud/api/endpoints/tiny?wait_s=20")).json()
    assert {name: told[name] for name in limits} == limits
    [replica] = told["replicas"]
    assert (replica["context_length"], replica["num_parallel"], replica["num_threads"]) == (512, 4, 3)
    assert replica["memory"] == {"process_bytes": 300 << 20, "cache_bytes": 64 << 20, "max_cache_bytes": 5 << 30}


async def test_an_adapter_is_served_when_its_base_model_is_known(server: Server, model: Path, own_root: Path) -> None:
    adapter = own_root.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}))
    (adapter / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": str(adapter)})
    assert "'meta-llama/Llama-3.2-1B' is not a folder here" in refusal(answer, 422, "ModelError")
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": str(adapter), "base_model": "/nowhere"})
    assert "--base-model /nowhere is not a folder" in refusal(answer, 422, "ModelError")
    await server.ask("POST", "llmcloud/api/endpoints", {"target": str(adapter), "base_model": str(model)})
    told = (await server.ask("GET", "llmcloud/api/endpoints/adapter?wait_s=20")).json()
    assert (told["state"], told["base_model"]) == ("ready", str(model))
    (model / "config.json").write_text('{"another": 1}')
    await server.ask("DELETE", "llmcloud/api/endpoints/adapter")
    await server.ask("POST", "llmcloud/api/endpoints", {"target": str(adapter), "base_model": str(model)})
    again = (await server.ask("GET", "llmcloud/api/endpoints/adapter?wait_s=20")).json()
    assert again["revision"] != told["revision"]


async def test_a_model_that_cannot_be_loaded_fails_its_endpoint_with_the_reason(server: Server, own_root: Path) -> None:
    folder = make_model(own_root.parent / "broken", "broken")
    await server.ask("POST", "llmcloud/api/endpoints", {"target": str(folder), "name": "tiny"})
    told = (await server.ask("GET", "llmcloud/api/endpoints/tiny?wait_s=20")).json()
    assert told["state"] == "failed" and "another shape" in told["reason"]
    answer = await server.complete("hello")
    assert answer.status_code == 503 and "another shape" in answer.json()["error"]["message"]


async def test_an_endpoint_on_a_cluster_that_does_not_exist_fails_with_the_reason(server: Server, model: Path) -> None:
    await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), "name": "tiny", "cluster": "nowhere"})
    told = (await server.ask("GET", "llmcloud/api/endpoints/tiny?wait_s=20")).json()
    assert told["state"] == "failed" and "'nowhere'" in told["reason"]


async def test_the_log_of_a_replica_can_be_read(server: Server, model: Path) -> None:
    await server.serve(model)
    Path(server.context.endpoints.get("tiny").logs()[0]).write_text("one\ntwo\nthree\n")
    told = (await server.ask("GET", "llmcloud/api/endpoints/tiny/logs?limit=2")).json()
    assert [row["text"] for row in told["logs"]] == ["two\nthree\n"]


async def test_a_key_is_told_once_and_listed_without_its_secret(server: Server) -> None:
    answer = await server.ask("POST", "llmcloud/api/keys", {"scopes": ["infer:*"], "label": "for tests"})
    assert answer.status_code == 201 and answer.headers["Cache-Control"] == "no-store"
    listed = await server.ask("GET", "llmcloud/api/keys")
    [key] = listed.json()["keys"]
    assert (key["id"], key["state"], key["label"]) == (answer.json()["id"], "valid", "for tests")
    assert answer.json()["key"].split("-")[3] not in listed.text
    await server.ask("DELETE", f"llmcloud/api/keys/{key['id']}")
    assert (await server.ask("GET", "llmcloud/api/keys")).json()["keys"][0]["state"] == "revoked"
    refusal(await server.ask("DELETE", "llmcloud/api/keys/nothing"), 404, "NotFound")


async def test_changes_and_refusals_are_told_to_the_audit_and_as_events(server: Server, jp_serverapp: Any) -> None:
    events: list[dict[str, Any]] = []

    async def listen(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        events.append(data)

    jp_serverapp.event_logger.add_listener(schema_id=SCHEMA_ID, listener=listen)
    await server.ask("POST", "llmcloud/api/clusters", {"name": "c1"})
    await server.ask("POST", "llmcloud/api/clusters", {"name": "c1"})
    await server.ask("GET", "llmcloud/api/clusters")
    await until(lambda: len(events) == 2, "both events are told")
    rows = server.context.state.audit()
    assert [(row["action"], row["subject"], row["outcome"]) for row in rows] == [
        ("cluster.start", "c1", "NameTaken"),
        ("cluster.start", "c1", "done"),
    ]
    assert [event["outcome"] for event in events] == ["done", "NameTaken"]
    assert all(row["actor"] for row in rows)
