"""Servers of others behind a replica: started, watched, asked, ended; or somewhere else."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from jupyter_llmcloud.core.serving.models.engine_names import parse_engine, parse_variable
from jupyter_llmcloud.errors import ModelError, UsageError
from jupyter_llmcloud.inference import replica as replica_module
from jupyter_llmcloud.inference.app import Application, ReplicaStatus
from jupyter_llmcloud.inference.external.commands import EngineOptions, command_of
from jupyter_llmcloud.inference.external.forward import Forward, events_of
from jupyter_llmcloud.inference.external.opening import ExternalSpec, details, open_external
from jupyter_llmcloud.inference.external.server import ExternalServer
from jupyter_llmcloud.inference.replica import Replica, ReplicaSpec
from jupyter_llmcloud.storage.models.gguf import gguf_file
from tests.support.worlds import alive

STAND_IN = Path(__file__).parents[1] / "support" / "openai_stand_in.py"
TOKEN = "the-bearer"
DEADLINE_S = 60.0
Client = TestClient[Any, Any]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM and llama.cpp, as far as anybody can tell from outside."""
    for name in ("vllm", "llama-server"):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(STAND_IN))} "$@"\n')
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


Body = Callable[[Client, ExternalServer, ReplicaStatus], Awaitable[None]]


def serve(spec: ExternalSpec, body: Body) -> None:
    async def run() -> None:
        status = ReplicaStatus(spec.name, spec.name, 8)
        application = Application(status, TOKEN)
        server = await open_external(spec)
        assert server is not None
        try:
            application.external = Forward(server, spec.name, status, 32)
            status.state, status.details = "ready", await details(server, spec)
            http = TestServer(application.build(), handler_cancellation=True)
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with TestClient(http, headers=headers) as client, asyncio.timeout(DEADLINE_S):
                await body(client, server, status)
        finally:
            await server.close()

    asyncio.run(run())


async def complete(client: Client, prompt: str, **more: Any) -> tuple[int, Any]:
    async with client.post("/v1/completions", json={"model": "it", "prompt": prompt, **more}) as response:
        return response.status, await response.json(content_type=None)


async def events(client: Client, prompt: str, **more: Any) -> list[Any]:
    body = {"model": "it", "prompt": prompt, "stream": True, **more}
    async with client.post("/v1/completions", json=body, headers={"X-Request-Id": "r1"}) as response:
        text = await response.text()
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def arguments_of(process: psutil.Process) -> list[str]:
    """None of a process that has ended meanwhile: another test's."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_an_engine_is_started_asked_and_ended(engine: str, installed: None, tmp_path: Path) -> None:
    children: list[psutil.Process] = []

    async def asks(client: Client, server: ExternalServer, status: ReplicaStatus) -> None:
        children.extend(child for child in psutil.Process().children() if "--port" in arguments_of(child))
        assert status.details["engine"] == engine and status.details["context_length"] == 64
        code, told = await complete(client, "hello")
        assert code == 200 and told["choices"][0]["text"] == "hello!" and told["model"] == "it"
        got = await events(client, "count 3")
        assert [event["choices"][0]["text"] for event in got[:-1]] == ["0 ", "1 ", "2 "] and got[-1] == "[DONE]"
        got = await events(client, "count 1", stream_options={"include_usage": True})
        assert got[-2]["usage"]["completion_tokens"] == 5
        usage = await (await client.get("/usage/r1")).json()
        assert usage["completion_tokens"] == 5  # also of the stream that did not tell it
        code, told = await complete(client, "bad")
        assert code == 400 and told["error"]["param"] == "temperature"
        assert (status.num_open, status.num_generated_tokens) == (0, 15)
        infer = await client.post("/v2/models/it/infer", json={"inputs": 1})
        assert infer.status == 400 and "generates text" in (await infer.json())["error"]
        assert all(server._key not in " ".join(child.cmdline()) for child in children)

    serve(ExternalSpec(engine, str(tmp_path), "it", max_concurrent=4, max_model_len=64), asks)
    assert children and not any(alive(child.pid) for child in children)


def test_who_hangs_up_ends_the_work_of_the_engine(installed: None, tmp_path: Path) -> None:
    async def asks(client: Client, server: ExternalServer, status: ReplicaStatus) -> None:
        body = {"model": "it", "prompt": "count 100000", "stream": True}
        async with client.post("/v1/completions", json=body) as response:
            await response.content.readany()
        root = server.base_url.removesuffix("/v1")
        while not (await (await server.session.get(f"{root}/stats")).json())["cancelled"]:
            await asyncio.sleep(0.02)
        while status.num_open:
            await asyncio.sleep(0.02)

    serve(ExternalSpec("vllm", str(tmp_path), "it"), asks)


def test_an_engine_that_dies_fails_its_streams_and_the_replica(installed: None, tmp_path: Path) -> None:
    async def asks(client: Client, server: ExternalServer, status: ReplicaStatus) -> None:
        failed = asyncio.Event()
        server.on_failure = failed.set
        got = await events(client, "die 5")
        assert got[0]["choices"][0]["text"] == "0 " and "was lost" in got[-1]["error"]["message"]
        await failed.wait()
        assert "ended with status 7" in (server.failure or "")
        code, told = await complete(client, "hello")
        assert code == 503 and told["error"]["code"] == "engine_failed" and status.num_open == 0

    serve(ExternalSpec("vllm", str(tmp_path), "it"), asks)


def test_an_engine_that_does_not_come_up_says_its_last_words(installed: None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"ended with status 3: ValueError: the weights are of no known kind"):
        asyncio.run(open_external(ExternalSpec("vllm", str(tmp_path / "broken"), "it")))


@pytest.mark.parametrize(("engine", "package"), [("vllm", "vllm"), ("llama.cpp", "llama-cpp-python")])
def test_what_is_not_installed_is_named_with_the_way_to_get_it(engine: str, package: str) -> None:
    import importlib.util

    if importlib.util.find_spec({"vllm": "vllm"}.get(engine, "llama_cpp")):
        pytest.skip("it is installed here")
    with pytest.raises(ModelError, match=f"not installed where models are served: pip install '?{package}"):
        command_of(engine, EngineOptions("m", "it", 1, "k"), which=lambda name: None)


def test_a_server_elsewhere_gets_its_key_its_model_and_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen.append((request.headers["Authorization"], body["model"]))
        if body.get("stream"):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b'data: {"model":"big-1","choices":[{"delta":{"content":"x"}}]}\r\n\r\ndata: [DO')
            await response.write(b"NE]\n\n")
            return response
        if body["messages"] == []:
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        return web.json_response({"model": "big-1", "choices": [{"message": {"content": "yes"}}]})

    async def models(request: web.Request) -> web.Response:
        known = request.headers.get("Authorization") == "Bearer sk-secret"
        return web.json_response({"data": [{"id": "big-1"}]}) if known else web.Response(status=401)

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        app.router.add_get("/v1/models", models)
        async with TestServer(app) as remote:
            url = str(remote.make_url("/v1"))
            await asks(url)

    async def asks(url: str) -> None:
        with pytest.raises(ModelError, match="MY_KEY is not set"):
            await open_external(ExternalSpec(url, "big-1", "it", key_variable="MY_KEY"))
        monkeypatch.setenv("MY_KEY", "sk-wrong")
        with pytest.raises(ModelError, match="refuses the key") as error:
            await open_external(ExternalSpec(url, "big-1", "it", key_variable="MY_KEY"))
        assert "sk-wrong" not in str(error.value)
        monkeypatch.setenv("MY_KEY", "sk-secret")
        with pytest.raises(ModelError, match=r"has no model .small.\. It has: big-1"):
            await open_external(ExternalSpec(url, "small", "it", key_variable="MY_KEY"))
        server = await open_external(ExternalSpec(url, "big-1", "it", key_variable="MY_KEY"))
        assert server is not None
        status = ReplicaStatus("it", "it", 8)
        application = Application(status, TOKEN)
        application.external = Forward(server, "it", status, 8)
        http = TestServer(application.build(), handler_cancellation=True)
        async with TestClient(http, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            body = {"model": "it", "messages": [{"role": "user", "content": "?"}]}
            told = await (await client.post("/v1/chat/completions", json=body)).json()
            assert told["model"] == "it" and seen == [("Bearer sk-secret", "big-1")]
            text = await (await client.post("/v1/chat/completions", json={**body, "stream": True})).text()
            assert '"model":"it"' in text and text.endswith("data: [DONE]\n\n")
            refused = await client.post("/v1/chat/completions", json={"model": "it", "messages": []})
            assert refused.status == 503 and "refuses the key" in (await refused.json())["error"]["message"]
            missing = await client.post("/v1/embeddings", json={"model": "it", "input": "x"})
            assert missing.status == 400
        await server.close()

    asyncio.run(run())


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_events_are_the_same_wherever_the_network_cuts_them(end: bytes) -> None:
    whole = b"data: 1" + 2 * end + b"data: [DONE]" + 2 * end

    async def read(cut: int) -> list[bytes]:
        async def pieces() -> AsyncIterator[bytes]:
            for piece in (whole[:cut], whole[cut:]):
                yield piece

        response: Any = SimpleNamespace(content=SimpleNamespace(iter_any=pieces))
        return [event async for event in events_of(response)]

    for cut in range(len(whole)):
        assert asyncio.run(read(cut)) == [b"data: 1\n\n", b"data: [DONE]\n\n"]


@pytest.mark.parametrize("text", ["fast", "ftp://x", "https://user:pw@x/v1", "https://x/v1?key=1", "https://"])
def test_what_is_no_engine_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_engine(text)
    assert "pw" not in str(error.value)


def test_an_engine_by_its_name_or_url() -> None:
    assert parse_engine("llama.cpp") == "llama.cpp"
    assert parse_engine("http://localhost:8000/v1/") == "http://localhost:8000/v1"
    with pytest.raises(UsageError) as error:
        parse_variable("sk-secret-key")
    assert "sk-secret" not in str(error.value)


def test_a_gguf_file_is_found_in_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no"):
        gguf_file(tmp_path)
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF....")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"GGUF....")
    assert gguf_file(tmp_path).name == "m-00001-of-00002.gguf"
    (tmp_path / "other.gguf").write_bytes(b"no")
    with pytest.raises(ModelError, match="holds 2 GGUF files"):
        gguf_file(tmp_path)
    with pytest.raises(ModelError, match="is no GGUF file"):
        gguf_file(tmp_path / "other.gguf")


def test_an_adapter_is_not_answered_for_by_the_model_that_it_belongs_to(installed: None, tmp_path: Path) -> None:
    async def asks(client: Client, server: ExternalServer, status: ReplicaStatus) -> None:
        for name in ("it:legal", "legal", 3):
            async with client.post("/v1/completions", json={"model": name, "prompt": "hello"}) as response:
                told = await response.json()
                assert response.status == 404 and told["error"]["code"] == "model_not_found", told
        assert "serves 'it' by vllm, and loads no adapters" in told["error"]["message"]
        assert (await complete(client, "hello"))[0] == 200 and status.num_open == 0

    serve(ExternalSpec("vllm", str(tmp_path), "it"), asks)


def test_an_endpoint_with_adapters_keeps_an_engine_of_ours_or_says_that_it_has_none_of_them(
    monkeypatch: pytest.MonkeyPatch, own_root: Path
) -> None:
    class Elsewhere(ExternalServer):
        async def models(self) -> dict[str, Any]:
            return {}

    opened: list[str] = []

    async def open_it(spec: ExternalSpec) -> ExternalServer:
        opened.append(spec.engine)
        return Elsewhere("vllm", "it", "http://127.0.0.1:9/v1", "")

    async def ready(engine: str) -> dict[str, Any]:
        asked = {"endpoint": "it", "model": "m", "socket": "s", "token": TOKEN, "served_name": "it", "device": "cuda:0"}
        replica = Replica(ReplicaSpec(**asked, engine=engine, num_threads=1, adapters={"legal": "folder"}))
        if not await replica._open_external():
            return {}
        replica.status.state = "ready"
        app = TestServer(replica._application.build())
        async with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            told: dict[str, Any] = await (await client.get("/readyz")).json()
            return told

    monkeypatch.setattr(replica_module, "open_external", open_it)
    assert asyncio.run(ready("auto")) == {} and opened == []
    assert asyncio.run(ready("vllm"))["adapters_refused"] == {"legal": "vllm loads no adapters here"}
