"""The OpenAPI document: all routes are in it, it is one, and it is what the server answers."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from openapi_spec_validator import validate

from jupyter_llmcloud.cluster.record import ClusterRecord
from jupyter_llmcloud.core.spec import EndpointSpec, Interface, RunSpec
from jupyter_llmcloud.protocol.http import clusters, events, runs
from jupyter_llmcloud.storage.runs import RunRecord
from tests.server.test_server_access import PUBLIC, routes
from tests.server.test_server_routes import make_run
from tests.support.api_schema import DOCUMENT, Undescribed, check, validator
from tests.support.server_parts import Server

pytest_plugins = ["tests.support.server_fixtures"]
PATHS: dict[str, Any] = DOCUMENT["paths"]
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, told) for path, methods in PATHS.items() for method, told in methods.items()]


def test_the_document_is_openapi() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    validate(DOCUMENT)


def test_every_method_of_every_route_is_in_it_and_nothing_else() -> None:
    told = {(method.upper(), re.sub(r"\{\w+\}", "name", path)) for path, method, _ in operations()}
    assert told == {(method, path) for method, path, _ in routes()}


def test_every_operation_says_what_it_does_and_for_whom() -> None:
    for path, method, told in operations():
        assert told["summary"].strip() and not told["summary"].startswith(" "), (path, method)
        assert "x-jupyter-authorization" in told or (path in PUBLIC and told["security"] == [])
    names = [told["operationId"] for _, _, told in operations()]
    assert len(set(names)) == len(names)


def test_every_json_route_names_the_struct_of_its_answer() -> None:
    for path, method, told in operations():
        if "/api/" in path and "101" not in told["responses"]:
            answers = [answer for status, answer in told["responses"].items() if status != "default"]
            kinds = [content for answer in answers for content in answer["content"].items()]
            assert all(
                kind in ("text/plain", "application/x-ndjson") or "$ref" in content["schema"] for kind, content in kinds
            ), (path, method)
            assert told["responses"]["default"] == {"$ref": "#/components/responses/Refusal"}


def test_options_are_those_of_their_specs_with_their_words() -> None:
    for schema, spec, more in (
        ("StartEndpoint", EndpointSpec, {"target", "source", "reuse"}),
        ("RunOptions", RunSpec, set()),
    ):
        told = SCHEMAS[schema]["properties"]
        options = {option.name: option for option in spec.options(Interface.REST)}
        assert set(told) == set(options) | more
        assert {name: told[name]["description"] for name in options} == {
            name: option.help for name, option in options.items()
        }
    assert SCHEMAS["RunOptions"]["properties"]["precision"]["enum"] == ["no", "bf16", "fp16", "fp8"]
    assert SCHEMAS["RunOptions"]["properties"]["timeout"]["type"] == ["number", "string"]
    assert SCHEMAS["StartEndpoint"]["required"] == ["target"]


def test_nothing_that_a_record_tells_is_left_out() -> None:
    run = {field.name for field in dataclasses.fields(RunRecord)} - {"starter"}  # only until an agent has it
    assert run <= set(runs.RunDetail.__struct_fields__)
    told = ClusterRecord("c1", "local", "local").public()
    assert msgspec.structs.asdict(clusters.Cluster(**told)).items() >= told.items()


def test_the_messages_of_the_events_are_in_it() -> None:
    subscribe = events.SubscribeTopics(topics=["runs"], epoch="e", cursor=3)
    validator("#/components/schemas/ClientMessage").validate(json.loads(events.write(subscribe)))
    server = validator("#/components/schemas/ServerMessage")
    server.validate(json.loads(events.write(events.Hello(epoch="e", version="1", heartbeat_s=20))))
    info = events.RunInfo(run_id="a", name="a", state="running", created=1.0)
    server.validate(json.loads(events.write(events.RunInfoChanged(run_id="a", cursor=1, info=info))))
    run = runs.Run(
        run_id="a",
        name="a",
        state="running",
        created=1.0,
        ended=None,
        world_size=1,
        ranks=[0],
        cluster="",
        artifacts={},
    )
    item = msgspec.to_builtins(run)
    server.validate(json.loads(events.write(events.Snapshot(topic="runs", cursor=1, items=[item]))))
    assert not server.is_valid({"type": "changed", "topic": "runs", "cursor": 1, "item": {"run_id": "a"}})
    assert not server.is_valid({"type": "nothing"})


def test_an_answer_that_is_not_as_described_is_found() -> None:
    check("GET", "/llmcloud/api/status", 200, {"version": "1", "pid": 3, "headless": False, "root": "/"})
    with pytest.raises(Undescribed, match="'root' is a required property"):
        check("GET", "/llmcloud/api/status", 200, {"version": "1", "pid": 3, "headless": False})
    with pytest.raises(Undescribed, match="'3' is not of type 'integer'"):
        check("GET", "/llmcloud/api/status", 200, {"version": "1", "pid": "3", "headless": False, "root": "/"})
    with pytest.raises(Undescribed, match="'message' is a required property"):
        check("GET", "/llmcloud/api/runs/name", 404, {"error": "NotFound"})


async def test_the_server_tells_it_with_its_own_base_url(server: Server, jp_base_url: str) -> None:
    told = (await server.ask("GET", "llmcloud/openapi.json")).json()
    assert told["servers"] == [{"url": jp_base_url.rstrip("/")}]
    assert told["paths"] == json.loads(json.dumps(PATHS))


def test_it_is_printed_without_a_server() -> None:
    command = [sys.executable, "-m", "jupyter_llmcloud.server.openapi"]
    printed = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert json.loads(printed) == json.loads(json.dumps(DOCUMENT))


async def test_half_characters_of_a_log_are_replaced_and_large_numbers_kept(server: Server) -> None:
    from jupyter_llmcloud.storage.journal import JournalWriter

    record = make_run()
    logs = JournalWriter(server.context.runs.folder(record.run_id).logs(0))
    logs.append([{"kind": "stdout", "text": "half \ud83d of it", "count": 1 << 70}])
    logs.close()
    answer = await server.ask("GET", "llmcloud/api/runs/train/logs?rank=0&limit=1")
    [told] = answer.json()["records"]
    assert told["text"] == "half \N{REPLACEMENT CHARACTER} of it"
    assert told["count"] == pytest.approx(1 << 70)
