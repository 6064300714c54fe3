"""The OpenAI surface: who is let in, what is copied, what happens when a replica or a client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from traitlets.config import Config

from jupyter_llmcloud.server.audit import REQUESTS_ID
from jupyter_llmcloud.server.gateway import admission
from jupyter_llmcloud.server.gateway.key_quotas import BodyBudget
from tests.support.plain_http import PLAIN
from tests.support.server_parts import Server, until

pytest_plugins = ["tests.support.server_fixtures"]


def in_flight() -> float:
    return REGISTRY.get_sample_value("llmcloud_requests_in_flight")


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"].startswith("application/json")
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def events(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def stream(server: Server, prompt: str, key: str, client: httpx.AsyncClient | None = None) -> Any:
    body = {"model": "tiny", "prompt": prompt, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    return (client or server.client).stream("POST", f"{server.url}/llmcloud/v1/completions", json=body, headers=headers)


async def test_a_key_asks_the_model(server: Server, model: Path) -> None:
    await server.serve(model)
    answer = await server.complete("hello", await server.key())
    assert answer.json()["choices"][0]["text"] == "hello!"
    assert answer.headers["X-Request-Id"].startswith("req-")
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("name", ["X-Api-Key", "api-key"])
async def test_a_key_may_come_in_a_header_of_other_clients(server: Server, model: Path, name: str) -> None:
    await server.serve(model)
    key = await server.key()
    answer = await server.client.get(f"{server.url}/llmcloud/v1/models", headers={name: key})
    assert [row["id"] for row in answer.json()["data"]] == ["tiny"]


async def test_the_jupyter_token_asks_the_model_in_every_way_that_jupyter_takes_it(server: Server, model: Path) -> None:
    await server.serve(model)
    url = f"{server.url}/llmcloud/v1/models/tiny"
    for headers in ({"Authorization": f"token {server.token}"}, {"Authorization": f"Bearer {server.token}"}):
        assert (await server.client.get(url, headers=headers)).json()["id"] == "tiny"
    assert (await server.client.get(f"{url}?token={server.token}")).json()["id"] == "tiny"


async def test_a_stream_is_copied_event_by_event(server: Server, model: Path) -> None:
    await server.serve(model)
    async with stream(server, "count 20", await server.key()) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["X-Accel-Buffering"] == "no"
        times = []
        received = b""
        async for chunk in answer.aiter_raw():
            times.append(time.monotonic())
            received += chunk
    assert received.count(b"data: ") == 21 and received.endswith(b"data: [DONE]\n\n")
    assert len(times) > 10 and times[-1] - times[0] > 0.15  # they came as they were made, not in one piece


@pytest.mark.parametrize("presented", ["sk-llmc-mistyped", "wrong token", ""])
async def test_who_is_not_known_gets_401_in_openais_words(server: Server, presented: str) -> None:
    headers = {"Authorization": f"Bearer {presented}"} if presented else {}
    for method, path in (("GET", "models"), ("POST", "completions"), ("POST", "chat/completions"), ("GET", "nothing")):
        answer = await server.client.request(method, f"{server.url}/llmcloud/v1/{path}", headers=headers, json={})
        assert error_of(answer, 401)["type"] == "authentication_error"
        assert "Set-Cookie" not in answer.headers


async def test_a_key_of_right_form_that_was_never_minted_is_not_valid(server: Server) -> None:
    from jupyter_llmcloud.core.serving.keys import make_key

    answer = await server.ask("GET", "llmcloud/v1/models", key=make_key(b"12345", b"x" * 32).text)
    assert error_of(answer, 401)["code"] == "invalid_api_key"


async def test_another_secret_does_not_open_a_known_id(server: Server) -> None:
    from jupyter_llmcloud.core.serving.keys import ApiKey, parse_key

    known = parse_key(await server.key())
    answer = await server.ask("GET", "llmcloud/v1/models", key=ApiKey(known.id, "A" * 43).text)
    error_of(answer, 401)


async def test_an_expired_key_is_not_valid(server: Server) -> None:
    key = await server.key(expires_s=1)
    await until(lambda: _status(server, key, 401), "the key expires")
    assert "has expired" in (await server.ask("GET", "llmcloud/v1/models", key=key)).json()["error"]["message"]


async def _status(server: Server, key: str, status: int) -> bool:
    return (await server.ask("GET", "llmcloud/v1/models", key=key)).status_code == status


async def test_outside_its_scope_a_key_gets_403_whether_or_not_the_model_exists(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key("infer:other")
    for name in ("tiny", "nothing"):
        assert error_of(await server.complete("hello", key, model=name), 403)["code"] == "scope_missing"
    assert error_of(await server.ask("GET", "llmcloud/v1/models", key=key), 403)["code"] == "scope_missing"


async def test_a_key_sees_the_models_it_may_ask(server: Server, model: Path) -> None:
    await server.serve(model, "tiny")
    await server.serve(model, "other")
    listed = await server.ask("GET", "llmcloud/v1/models", key=await server.key("infer:t*", "models:read"))
    assert [row["id"] for row in listed.json()["data"]] == ["tiny"]
    listed = await server.ask("GET", "llmcloud/v1/models", key=await server.key("models:read"))
    assert {row["id"] for row in listed.json()["data"]} == {"tiny", "other"}


async def test_an_unknown_model_is_404_and_names_those_there_are(server: Server, model: Path) -> None:
    await server.serve(model)
    error = error_of(await server.complete("hello", model="nothing"), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model" and "tiny" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"model":', b'{"model": 3}', b'{"prompt": "x"}',
        b'{"model": "tiny", "stream": "yes"}', b"[" * 20_000, b'{"model": NaN}',
    ],
)  # fmt: skip
async def test_a_body_that_is_no_request_is_400_and_the_next_one_works(
    server: Server, model: Path, body: bytes
) -> None:
    await server.serve(model)
    key = await server.key()
    headers = {"Authorization": f"Bearer {key}"}
    answer = await server.client.post(f"{server.url}/llmcloud/v1/completions", content=body, headers=headers)
    assert error_of(answer, 400)["type"] == "invalid_request_error"
    assert (await server.complete("hello", key)).status_code == 200


async def test_a_body_over_one_mebibyte_is_413_said_in_its_length_or_not(server: Server, model: Path) -> None:
    await server.serve(model)
    headers = {"Authorization": f"Bearer {await server.key()}"}
    url = f"{server.url}/llmcloud/v1/completions"

    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * (1 << 16)

    assert (
        error_of(await server.client.post(url, content=chunks(), headers=headers), 413)["code"] == "request_too_large"
    )
    path = httpx.URL(url).raw_path.decode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {headers['Authorization']}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    writer.write(f"{head}Content-Length: 60000000\r\n\r\n".encode())
    told = await asyncio.wait_for(reader.read(), 10)  # to the end of the connection, without waiting for the body
    assert b" 413 " in told.partition(b"\r\n")[0] and b'"request_too_large"' in told
    writer.close()


async def test_a_thousand_texts_to_embed_are_taken_as_long_as_there_is_memory_for_large_bodies(
    server: Server, model: Path
) -> None:
    await server.serve(model)
    headers = {"Authorization": f"Bearer {await server.key()}"}
    budget = server.context.quotas.bodies = BodyBudget(4 << 20)

    async def ask(route: str, num_bytes: int, *, says_length: bool = True) -> httpx.Response:
        body = b'{"model": "tiny", "input": ["' + b"x" * num_bytes + b'"]}'

        async def pieces() -> Any:
            yield body

        url, content = f"{server.url}/llmcloud/v1/{route}", body if says_length else pieces()
        return await server.client.post(url, content=content, headers=headers)

    assert (await ask("embeddings", 3 << 20)).status_code == 200
    assert (await ask("embeddings", 3 << 20, says_length=False)).status_code == 200
    error_of(await ask("embeddings", 5 << 20), 413)
    error_of(await ask("completions", 3 << 20), 413)
    assert budget.take(3 << 20)  # others hold it
    busy = await ask("embeddings", 3 << 20)
    assert error_of(busy, 503)["code"] == "server_busy" and busy.headers["Retry-After"]
    assert (await ask("embeddings", 1 << 10)).status_code == 200
    assert budget.take(1 << 20) and not budget.take(1)  # nothing is kept of any of them


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "p"}, "model", "Parameter 'model' is missing."),
        ({"model": None, "prompt": "p"}, "model", "model must be a string, not null (null)."),
        ({"model": "tiny", "stream": "yes"}, "stream", 'stream must be true or false, not a string ("yes").'),
        (["x"], None, "The body must be an object, not a list."),
    ],
)
async def test_what_the_gateway_itself_reads_is_refused_in_plain_words(
    server: Server, model: Path, body: Any, param: str | None, words: str
) -> None:
    await server.serve(model)
    headers = {"Authorization": f"Bearer {await server.key()}"}
    answer = await server.client.post(f"{server.url}/llmcloud/v1/completions", json=body, headers=headers)
    error = error_of(answer, 400)
    assert (error["param"], error["message"]) == (param, words) and error["code"]


async def test_an_adapter_that_is_not_there_is_404_for_who_may_ask_its_endpoint(server: Server, model: Path) -> None:
    await server.serve(model)
    for scope, status, code in (("infer:*", 404, "model_not_found"), ("infer:other", 403, "scope_missing")):
        answer = await server.complete("hello", await server.key(scope), model="tiny:nothing")
        assert error_of(answer, status)["code"] == code


async def test_an_unknown_path_is_404_in_openais_words(server: Server) -> None:
    for path, code in (("nothing", "unknown_url"), ("completions/x", "unknown_url"), ("models/a/b", "model_not_found")):
        answer = await server.ask("GET", f"llmcloud/v1/{path}", key=await server.key("infer:*", "models:read"))
        assert error_of(answer, 404)["code"] == code


async def test_what_a_replica_refuses_reaches_the_client_as_it_is(server: Server, model: Path) -> None:
    await server.serve(model)
    answer = await server.complete("busy", await server.key())
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "7"
    assert answer.json()["error"]["message"] == "busy"


async def test_a_request_waits_for_an_endpoint_that_starts_for_the_first_time(server: Server, own_root: Path) -> None:
    """It was refused at once, and a client that tries twice again within seconds gave up while the model was loaded."""
    from tests.support.server_parts import make_model

    folder = make_model(own_root.parent / "slow", "slow")
    await server.ask("POST", "llmcloud/api/endpoints", {"target": str(folder), "name": "tiny"})
    endpoint = server.context.endpoints.get("tiny")
    asking = asyncio.ensure_future(server.complete("hello"))
    await until(lambda: endpoint.admission.num_waiting == 1, "the request waits")
    body, patience = {"model": "tiny", "prompt": "hello"}, {"X-Stainless-Read-Timeout": "2"}
    refused = await server.ask("POST", "llmcloud/v1/completions", body, headers=patience)
    error = error_of(refused, 503)
    assert (
        error["code"] == "model_not_ready" and "no replica became ready within 1 s. It is starting" in error["message"]
    )
    assert int(refused.headers["Retry-After"]) >= 1
    (folder / "slow").unlink()
    assert (await asking).json()["choices"][0]["text"] == "hello!"


async def test_who_waits_for_a_first_start_that_fails_is_told_why(server: Server, own_root: Path) -> None:
    from tests.support.server_parts import make_model

    folder = make_model(own_root.parent / "slow", "slow")
    await server.ask("POST", "llmcloud/api/endpoints", {"target": str(folder), "name": "tiny"})
    asking = asyncio.ensure_future(server.complete("hello"))
    await until(lambda: server.context.endpoints.get("tiny").admission.num_waiting == 1, "the request waits")
    (folder / "broken").touch()
    assert "none is on its way. It is failed" in (message := error_of(await asking, 503)["message"])
    assert "another shape" in message


async def test_a_full_queue_is_429_and_those_in_it_are_answered(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.agent.max_concurrent = 1
    monkeypatch.setattr(admission, "MAX_QUEUED_PER_REPLICA", 2)
    await server.serve(model)
    key = await server.key()
    async with stream(server, "endless", key):
        waiting = [asyncio.ensure_future(server.complete("hello", key)) for _ in range(2)]
        await until(lambda: in_flight() == 3, "one is answered and two wait")
        answer = await server.complete("hello", key)
        assert error_of(answer, 429)["code"] == "queue_full"
        assert int(answer.headers["Retry-After"]) >= 1
    assert [(await request).status_code for request in waiting] == [200, 200]
    assert in_flight() == 0


async def test_a_client_that_hangs_up_frees_the_replica_streaming_or_not(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    async with (
        httpx.AsyncClient(trust_env=False, verify=PLAIN) as client,
        stream(server, "endless", key, client) as answer,
    ):
        await anext(answer.aiter_raw())
        assert in_flight() == 1
    await until(lambda: _counted(server, cancelled=1, active=0), "the stream ends in the replica")
    with pytest.raises(httpx.ReadTimeout):
        await _hang_up(server, key)
    await until(lambda: _counted(server, cancelled=2, active=0), "the request ends in the replica")
    await until(lambda: in_flight() == 0, "nothing is in flight")
    assert server.context.endpoints.get("tiny").ready_replicas()[0].num_in_flight == 0


async def test_after_two_hundred_hang_ups_nothing_is_left_of_them(server: Server, model: Path) -> None:
    await server.serve(model, replicas=2)
    key = await server.key()
    turns = asyncio.Semaphore(16)

    async def hang_up(number: int) -> None:
        async with turns, httpx.AsyncClient(timeout=0.3, trust_env=False, verify=PLAIN) as client:
            if number % 2:  # in the middle of its answer
                async with stream(server, "endless", key, client) as answer:
                    await anext(answer.aiter_raw())
            else:  # before the first byte
                with contextlib.suppress(httpx.ReadTimeout):
                    body = {"model": "tiny", "prompt": "wait", "user": str(number)}
                    headers = {"Authorization": f"Bearer {key}"}
                    await client.post(f"{server.url}/llmcloud/v1/completions", json=body, headers=headers)

    outcomes = await asyncio.gather(*(hang_up(number) for number in range(200)), return_exceptions=True)
    unexpected = [one for one in outcomes if one is not None and not isinstance(one, httpx.TimeoutException)]
    assert not unexpected
    replicas = server.context.endpoints.get("tiny").ready_replicas()
    assert len(replicas) == 2
    await until(lambda: in_flight() == 0, "nothing is in flight")
    assert [(one.num_in_flight, one.load.outstanding_tokens) for one in replicas] == [(0, 0)] * 2

    async def nothing_runs() -> bool:
        active = []
        for replica in replicas:
            async with replica.session.get("/stats") as answer:
                active.append((await answer.json())["active"])
        return active == [0, 0]

    await until(nothing_runs, "no replica works for anybody")
    assert (await server.complete("hello", key)).status_code == 200


async def test_a_replica_that_is_killed_fails_only_its_own_streams_and_is_replaced_within_ten_seconds(
    server: Server, model: Path
) -> None:
    await server.serve(model, replicas=2)
    key = await server.key()
    endpoint = server.context.endpoints.get("tiny")
    await until(lambda: len(endpoint.ready_replicas()) == 2, "both are ready")
    begun: set[int] = set()

    async def read(number: int) -> str:
        async with stream(server, "count 150", key) as answer:
            text = ""
            async for chunk in answer.aiter_text():
                text += chunk
                begun.add(number)
        return "done" if text.endswith("data: [DONE]\n\n") else "error" if '"replica_lost"' in text else text[-200:]

    reading = [asyncio.ensure_future(read(number)) for number in range(12)]
    await until(lambda: len(begun) == 12, "all of them are answered")
    shares = {one.pid: one.num_in_flight for one in endpoint.ready_replicas()}
    victim = next(iter(shares))
    os.kill(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    outcomes = await asyncio.gather(*reading)
    assert outcomes.count("error") == shares[victim] == 6 and outcomes.count("done") == 6, outcomes
    await until(lambda: len(endpoint.ready_replicas()) == 2, "it is replaced")
    assert time.monotonic() - killed_at < 10


async def _hang_up(server: Server, key: str) -> None:
    async with httpx.AsyncClient(timeout=0.5, trust_env=False, verify=PLAIN) as client:
        body = {"model": "tiny", "prompt": "wait"}
        headers = {"Authorization": f"Bearer {key}"}
        await client.post(f"{server.url}/llmcloud/v1/completions", json=body, headers=headers)


async def _counted(server: Server, **wanted: int) -> bool:
    counted = await server.stats()
    return all(counted[name] == value for name, value in wanted.items())


async def test_who_waits_in_the_queue_and_hangs_up_leaves_no_place_taken(server: Server, model: Path) -> None:
    server.agent.max_concurrent = 1
    await server.serve(model)
    key = await server.key()
    async with stream(server, "count 60", key) as first:
        with pytest.raises(httpx.ReadTimeout):
            await _hang_up(server, key)
        await until(lambda: in_flight() == 1, "the one that waited is gone")
        await first.aread()
    assert (await server.complete("hello", key)).status_code == 200
    assert in_flight() == 0


@pytest.mark.alone
async def test_a_revoked_key_ends_its_open_stream_within_a_second(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    async with stream(server, "endless", key) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        began = time.monotonic()
        await server.ask("DELETE", f"llmcloud/api/keys/{key.split('-')[2]}")
        rest = [line async for line in lines if line]
    assert time.monotonic() - began < 1
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "invalid_api_key"
    error_of(await server.complete("hello", key), 401)
    await until(lambda: _counted(server, active=0), "the replica stops")


@pytest.mark.alone
async def test_a_key_revoked_by_another_server_ends_its_open_stream_within_a_second(
    server: Server, model: Path
) -> None:
    from jupyter_llmcloud.storage.server_state import ServerState

    await server.serve(model)
    key = await server.key()
    other = ServerState()
    async with stream(server, "endless", key) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        began = time.monotonic()
        other.revoke_key(key.split("-")[2], time.time())
        rest = [line async for line in lines if line]
    assert time.monotonic() - began < 1.5
    assert "[DONE]" not in rest[-1]
    other.close()


async def test_a_replica_that_dies_before_it_answers_is_tried_again_on_another(server: Server, model: Path) -> None:
    await server.serve(model, replicas=2)
    await until(lambda: len(server.context.endpoints.get("tiny").ready_replicas()) == 2, "both replicas are ready")
    first = server.context.endpoints.get("tiny").ready_replicas()[0]
    os.kill(first.pid, signal.SIGKILL)
    server.agent.processes[first.id].wait()
    assert (await server.complete("hello", await server.key())).status_code == 200
    await until(lambda: len(server.context.endpoints.get("tiny").ready_replicas()) == 2, "the dead one is replaced")
    assert first.pid not in [replica.pid for replica in server.context.endpoints.get("tiny").ready_replicas()]


async def test_a_replica_that_dies_in_a_stream_fails_that_stream_with_an_error_event(
    server: Server, model: Path
) -> None:
    await server.serve(model, replicas=2)
    await until(lambda: len(server.context.endpoints.get("tiny").ready_replicas()) == 2, "both replicas are ready")
    key = await server.key()
    async with stream(server, "count 100", key) as other:
        reading = asyncio.ensure_future(events(other))
        await until(lambda: in_flight() == 1, "the other stream has its replica")
        async with stream(server, "die after 3", key) as answer:
            got = await events(answer)
        assert [event["choices"][0]["text"] for event in got[:-1]] == ["0 ", "1 ", "2 "]
        assert got[-1]["error"]["code"] == "replica_lost"
        assert (await reading)[-1] == "[DONE]"
    await until(lambda: in_flight() == 0, "nothing is in flight")


async def test_when_every_replica_dies_of_a_request_it_is_503_and_the_endpoint_comes_back(
    server: Server, model: Path
) -> None:
    await server.serve(model)
    answer = await server.complete("die", await server.key())
    assert error_of(answer, 503)["code"] == "model_not_ready"
    await until(lambda: server.context.endpoints.get("tiny").ready_replicas(), "the replica is replaced")
    assert (await server.complete("hello", await server.key())).status_code == 200


async def test_each_request_is_written_down_without_what_was_said(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    await server.complete("a secret prompt", key)
    await server.context.requests.write()
    row = server.context.state.usage()[0]
    assert (row["actor"], row["endpoint"], row["status"]) == (f"key:{key.split('-')[2]}", "tiny", 200)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (3, 5)
    assert "a secret prompt" not in json.dumps(row)


async def test_requests_that_have_ended_are_told_as_events_also_those_that_were_refused(
    server: Server, model: Path, jp_serverapp: Any
) -> None:
    events: list[dict[str, Any]] = []

    async def listen(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        events.extend(data["requests"])

    jp_serverapp.event_logger.add_listener(schema_id=REQUESTS_ID, listener=listen)
    await server.serve(model)
    key = await server.key()
    await server.complete("a secret prompt", key)
    await server.complete("hello", key, model="nothing")
    await server.context.requests.write()
    await until(lambda: len(events) == 2, "both are told")
    assert [(event["status"], event["outcome"]) for event in events] == [(200, "done"), (403, "refused")]
    assert events[0]["prompt_tokens"] == 3 and events[0]["actor"] == f"key:{key.split('-')[2]}"
    assert "secret prompt" not in json.dumps(events)


async def test_a_stream_that_tells_no_usage_is_counted_too_also_when_its_client_hangs_up(
    server: Server, model: Path
) -> None:
    await server.serve(model)
    key = await server.key()
    async with stream(server, "count 5", key) as answer:
        assert (await answer.aread()).endswith(b"data: [DONE]\n\n")
    assert ": usage" not in answer.text  # which the replica tells the gateway behind that
    async with (
        httpx.AsyncClient(trust_env=False, verify=PLAIN) as client,
        stream(server, "endless", key, client) as answer,
    ):
        await anext(answer.aiter_raw())
    await until(lambda: in_flight() == 0, "nothing is in flight")
    await server.context.requests.write()
    rows = {row["outcome"]: (row["prompt_tokens"], row["completion_tokens"]) for row in server.context.state.usage()}
    assert rows == {"done": (3, 5), "hung up": (3, 7)}


@pytest.mark.parametrize("path", ["llmcloud/v1/models", "llmcloud/api/status", "llmcloud/v1/nothing"])
async def test_a_page_of_another_origin_cannot_read_an_answer(server: Server, path: str) -> None:
    headers = {"Origin": "https://evil.example"}
    for key in (None, await server.key()):
        for method in ("GET", "OPTIONS"):
            answer = await server.ask(method, path, key=key, headers=headers)
            assert "Access-Control-Allow-Origin" not in answer.headers


class TestAllowedOrigin:
    """With an origin that the server's configuration names."""

    @pytest.fixture
    def jp_server_config(self, jp_server_config: Config) -> Config:
        jp_server_config.ServerApp.allow_origin = "https://friend.example"
        return jp_server_config

    async def test_a_page_of_an_origin_that_is_allowed_can(self, server: Server) -> None:
        headers = {"Origin": "https://friend.example"}
        for key in (None, await server.key()):
            answer = await server.ask("GET", "llmcloud/v1/models", key=key, headers=headers)
            assert answer.headers["Access-Control-Allow-Origin"] == "https://friend.example"


async def test_a_request_counts_as_activity_of_the_server(server: Server, model: Path, jp_serverapp: Any) -> None:
    await server.serve(model)
    jp_serverapp.web_app.settings["last_activity_times"].pop("llmcloud", None)
    await server.complete("hello", await server.key())
    assert "llmcloud" in jp_serverapp.web_app.settings["last_activity_times"]


async def test_the_openai_client_works_as_it_is(server: Server, model: Path) -> None:
    openai = pytest.importorskip("openai")
    await server.serve(model)
    client = openai.AsyncOpenAI(base_url=f"{server.url}/llmcloud/v1", api_key=await server.key(), max_retries=0)
    done = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    assert done.choices[0].message.content == "hello!"
    pieces = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "count 3"}], stream=True
    )
    assert [piece.choices[0].delta.content async for piece in pieces] == ["0 ", "1 ", "2 "]
    with pytest.raises(openai.PermissionDeniedError):
        await client.completions.create(model="other", prompt="hello")
    await client.close()
