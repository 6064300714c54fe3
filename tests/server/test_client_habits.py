"""Requests as clients, proxies and load generators really write them: answered, or refused in words that help."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.server.test_gateway import error_of
from tests.support.server_parts import Server

pytest_plugins = ["tests.support.server_fixtures"]


async def test_clients_that_write_a_path_in_another_way_are_answered_or_told_the_right_one(
    server: Server, model: Path
) -> None:
    await server.serve(model)
    key = await server.key("infer:*", "models:read")
    body = {"model": "tiny", "prompt": "hello"}
    for path in ("/completions", "completions/", "//completions//"):
        assert (await server.ask("POST", f"llmcloud/v1/{path}", body, key=key)).status_code == 200, path
    for path in ("v1//models", "v1/models/", "v1/models/tiny/", "v2//health/live", "v2/models/tiny/"):
        assert (await server.ask("GET", f"llmcloud/{path}", key=key)).status_code in (200, 400), path
    for path in ("v1/v1/completions", "completions", "v1/messages", "v1"):
        answer = await server.ask("POST", f"llmcloud/{path}", body, key=key)
        error = error_of(answer, 404)
        assert error["code"] == "unknown_url" and "/llmcloud/v1/completions" in error["message"]


async def test_the_head_of_what_can_be_read_is_told_and_another_method_names_those_there_are(server: Server) -> None:
    key = await server.key("infer:*", "models:read")
    head = await server.ask("HEAD", "llmcloud/v1/models", key=key)
    assert (head.status_code, head.content) == (200, b"")
    for method, path, allowed in (
        ("POST", "models", "GET, HEAD, OPTIONS"), ("GET", "completions", "POST, OPTIONS"), ("HEAD", "completions", "POST, OPTIONS"),
        ("PUT", "files", "GET, POST, HEAD, OPTIONS"),
    ):  # fmt: skip
        refused = await server.ask(method, f"llmcloud/v1/{path}", key=key)
        assert (refused.status_code, refused.headers["Allow"]) == (405, allowed), (method, path)


async def test_a_compressed_body_is_read(server: Server, model: Path) -> None:
    await server.serve(model)
    headers = {"Authorization": f"Bearer {await server.key()}", "Content-Type": "application/json; charset=utf-8"}
    url = f"{server.url}/llmcloud/v1/completions"
    body = b'{"model": "tiny", "prompt": "hello"}'
    sent = [
        ("gzip", gzip.compress(body), 200),
        ("gzip", gzip.compress(b" " * 50_000_000), 413),
        ("gzip", body, 400),
        ("br", body, 415),
    ]
    for encoding, content, status in sent:
        answer = await server.client.post(url, content=content, headers={**headers, "Content-Encoding": encoding})
        assert answer.status_code == status, (encoding, answer.text)


async def test_a_body_that_waits_for_a_word_gets_one_answer_and_no_other_word_behind_it(
    server: Server, model: Path
) -> None:
    await server.serve(model)
    place = urlsplit(server.url)
    for key, expected in (("sk-llmc-wrong", b"HTTP/1.1 401"), (await server.key(), b"HTTP/1.1 100")):
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        body = b'{"model": "tiny", "prompt": "hello"}'
        head = (
            f"POST {place.path}/llmcloud/v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        )
        writer.write(f"{head}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        told = await reader.readuntil(b"\r\n\r\n")
        assert told.startswith(expected)
        assert (b"\r\nConnection: close\r\n" in told) is (b" 401 " in told)
        if b" 100 " in told:
            writer.write(body)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        else:
            rest = await reader.read()  # to its end: the connection is closed
            assert rest.startswith(b'{"error"') and b"HTTP/1.1" not in rest
        writer.close()


async def test_a_client_for_azure_names_the_model_in_the_path(server: Server, model: Path) -> None:
    await server.serve(model)
    key, other = await server.key("infer:*"), await server.key("infer:other")
    client = openai.AsyncAzureOpenAI(
        azure_endpoint=f"{server.url}/llmcloud/v1", api_key=key, api_version="2024-10-21", max_retries=0,
        http_client=httpx.AsyncClient(trust_env=False),
    )  # fmt: skip
    async with client:
        told = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
        assert told.choices[0].message.content == "hello!"
        stream = await client.completions.create(model="tiny", prompt="count 2", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "0 1 "
        with pytest.raises(openai.NotFoundError, match="there is no model 'none'"):
            await client.completions.create(model="none", prompt="x")
    url = f"{server.url}/llmcloud/v1/deployments/tiny/completions"
    answer = await server.client.post(url, json={"prompt": "hello"}, headers={"api-key": key})
    assert (answer.json()["choices"][0]["text"], answer.json()["model"]) == ("hello!", "tiny")
    for body, credential, status in (({"prompt": "x"}, other, 403), ([1], key, 400)):
        answer = await server.client.post(url, json=body, headers={"api-key": credential})
        assert error_of(answer, status)["message"]
    asked = await server.client.post(url, json={"prompt": "hello"}, headers={"api-key": key})
    await server.context.requests.write()
    row = server.context.state.request(asked.headers["x-request-id"])
    assert row is not None and (row["route"], row["endpoint"]) == ("completions", "tiny")


async def test_the_input_of_a_response_is_listed_by_the_replica_that_keeps_it(server: Server, model: Path) -> None:
    told = await server.serve(model)
    path = f"llmcloud/v1/responses/resp_{told['replicas'][0]['id']}_{'0' * 32}/input_items"
    key = await server.key()
    answer = await server.ask("GET", f"{path}?limit=3&after=msg_1%26x", key=key)
    assert answer.json() == {"owner": key.split("-")[2], "limit": "3", "after": "msg_1&x"}
    refused = await server.ask("GET", path, key=await server.key("infer:other"))
    assert error_of(refused, 404)["code"] == "response_not_found"


async def test_a_response_is_read_again_from_the_replica_that_keeps_it(server: Server, model: Path) -> None:
    told = await server.serve(model)
    path = f"llmcloud/v1/responses/resp_{told['replicas'][0]['id']}_{'0' * 32}"
    key = await server.key()
    answer = await server.ask("GET", path, key=key)
    assert (answer.status_code, answer.json()["owner"]) == (200, key.split("-")[2])
    for credential, unknown in ((await server.key("infer:other"), path), (key, f"{path[:-33]}x_{'0' * 32}")):
        refused = await server.ask("GET", unknown, key=credential)
        assert error_of(refused, 404)["code"] == "response_not_found"


async def test_a_response_that_was_given_is_not_streamed_again(server: Server, model: Path) -> None:
    """OpenAI's client read the whole response as a stream, and found no event in it: that looked like an empty answer."""
    told = await server.serve(model)
    path = f"llmcloud/v1/responses/resp_{told['replicas'][0]['id']}_{'0' * 32}"
    key = await server.key()
    for query, param in (("stream=true", "stream"), ("starting_after=3", "starting_after")):
        refused = await server.ask("GET", f"{path}?{query}", key=key)
        assert error_of(refused, 400)["param"] == param
    assert (await server.ask("GET", f"{path}?stream=false&include[]=x", key=key)).status_code == 200
