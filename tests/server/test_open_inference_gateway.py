"""The Open Inference Protocol at the gateway: who is let in, what is copied, how errors look."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from jupyter_llmcloud.server.gateway import open_inference
from tests.support.server_parts import Server, until

pytest_plugins = ["tests.support.server_fixtures"]
CELL = "def load(): ...\ndef predict(inputs): return inputs\n"


def error_of(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"} and isinstance(answer.json()["error"], str)
    return answer.json()["error"]


async def infer(server: Server, body: Any, key: str | None = None, name: str = "tiny") -> httpx.Response:
    return await server.ask("POST", f"llmcloud/v2/models/{name}/infer", body, key)


async def test_the_server_tells_of_itself_and_of_its_models(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key("infer:tiny")
    told = (await server.ask("GET", "llmcloud/v2", key=key)).json()
    assert told["name"] == "jupyter-llmcloud" and "binary_tensor_data" in told["extensions"]
    assert (await server.ask("GET", "llmcloud/v2/health/live", key=key)).json() == {"live": True}
    assert (await server.ask("GET", "llmcloud/v2/health/ready", key=key)).json() == {"ready": True}
    for version in ("", "/versions/1"):
        path = f"llmcloud/v2/models/tiny{version}"
        assert (await server.ask("GET", path, key=key)).json()["platform"] == "stand-in"
        assert (await server.ask("GET", f"{path}/ready", key=key)).json() == {"name": "tiny", "ready": True}
        assert (await server.ask("POST", f"{path}/infer", {"inputs": 1}, key)).json() == {"inputs": 1}
    error_of(await server.ask("GET", "llmcloud/v2/models/tiny/versions/9", key=key), 404)
    error_of(await server.ask("GET", "llmcloud/v2/models/tiny/versions/9/ready", key=key), 404)


async def test_binary_tensors_are_copied_with_the_header_that_says_where_they_begin(
    server: Server, model: Path
) -> None:
    await server.serve(model)
    headers = {"Authorization": f"Bearer {await server.key()}", "Inference-Header-Content-Length": "2"}
    body = b"{}" + bytes(range(256)) * 8000  # more than a body of /v1 may have
    url = f"{server.url}/llmcloud/v2/models/tiny/infer"
    answer = await server.client.post(url, content=body, headers=headers)
    assert answer.content == body and answer.headers["Inference-Header-Content-Length"] == "2"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_request_reaches_the_model_as_it_was(server: Server, model: Path, encoding: str) -> None:
    await server.serve(model)
    header = b'{"inputs": [1]}'
    body = header + bytes(range(256))
    squeezed = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    headers = {"Authorization": f"Bearer {await server.key()}", "Content-Encoding": encoding}
    headers["Inference-Header-Content-Length"] = str(len(header))  # as tritonclient says it: of what was compressed
    url = f"{server.url}/llmcloud/v2/models/tiny/infer"
    answer = await server.client.post(url, content=squeezed, headers=headers)
    assert answer.status_code == 200 and answer.content == body


async def test_models_are_listed_and_described_as_tritons_clients_ask(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key("infer:tiny")
    for version in ("", "/versions/1"):
        told = (await server.ask("GET", f"llmcloud/v2/models/tiny{version}/config", key=key)).json()
        assert (told["name"], told["platform"], told["max_batch_size"]) == ("tiny", "stand-in", 0)
        assert told["input"] == [{"name": "text", "data_type": "TYPE_STRING", "dims": [-1]}]
        assert told["output"] == [{"name": "logits", "data_type": "TYPE_FP32", "dims": [-1, 2]}]
    error_of(await server.ask("GET", "llmcloud/v2/models/tiny/versions/9/config", key=key), 404)
    listed = {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
    for body in (None, {}, {"ready": True}):
        assert (await server.ask("POST", "llmcloud/v2/repository/index", body, key)).json() == [listed]
    other = await server.key("infer:other")
    assert (await server.ask("POST", "llmcloud/v2/repository/index", {}, other)).json() == []


async def test_keys_and_scopes_are_those_of_v1(server: Server, model: Path) -> None:
    await server.serve(model)
    url = f"{server.url}/llmcloud/v2/models/tiny/infer"
    error_of(await server.client.post(url, json={"inputs": 1}), 401)
    error_of(await server.client.post(url, json={"inputs": 1}, headers={"Authorization": "Bearer sk-llmc-no"}), 401)
    other = await server.key("infer:other")
    assert "may not ask model 'tiny'" in error_of(await infer(server, {"inputs": 1}, other), 403)
    error_of(await server.ask("GET", "llmcloud/v2/models/tiny", key=other), 403)
    assert "There is: tiny" in error_of(await infer(server, {"inputs": 1}, None, "none"), 404)
    error_of(await server.ask("GET", "llmcloud/v2/nothing"), 404)
    key = await server.key()
    await server.ask("DELETE", f"llmcloud/api/keys/{key.split('-')[2]}")
    assert "revoked" in error_of(await infer(server, {"inputs": 1}, key), 401)


async def test_a_body_that_is_too_large_is_refused(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.serve(model)
    monkeypatch.setattr(open_inference.OpenInferenceHandler, "max_body", 1000)
    assert "larger than 1000 bytes" in error_of(await infer(server, {"inputs": "x" * 2000}), 413)


async def test_a_request_is_written_down_and_counts_for_the_quota_of_its_key(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key("infer:tiny", requests_per_minute=2)
    assert [(await infer(server, {"inputs": 1}, key)).status_code for _ in range(3)] == [200, 200, 429]
    await server.context.requests.write()
    rows = server.context.state.usage()
    assert {row["route"] for row in rows} == {"v2/infer"} and len(rows) == 3


async def test_a_cell_is_served_from_its_source_and_replaced_by_its_next_version(server: Server) -> None:
    source = {"text": CELL, "name": "Cell In[4]", "first_line": 2, "folder": ""}
    body = {"target": "Cell In[4]", "name": "cell", "source": source}
    told = (await server.ask("POST", "llmcloud/api/endpoints", body)).json()
    assert told["kind"] == "python" and told["target"] == "Cell In[4]"
    await server.ask("GET", "llmcloud/api/endpoints/cell?wait_s=20")
    again = (await server.ask("POST", "llmcloud/api/endpoints", body)).json()
    assert [row["number"] for row in again["revisions"]] == [1]  # the same cell: nothing to do
    body["source"] = {**source, "text": CELL + "x = 1\n"}
    changed = (await server.ask("POST", "llmcloud/api/endpoints", body)).json()
    assert [row["number"] for row in changed["revisions"]] == [1, 2] and changed["revision"] != told["revision"]
    await until(lambda: _serves(server, 2), "the new version answers")
    saved = Path(changed["model"]) / "cell.json"
    assert json.loads(saved.read_text())["text"].endswith("x = 1\n") and saved.stat().st_mode & 0o077 == 0


async def _serves(server: Server, revision: int) -> bool:
    told = (await server.ask("GET", "llmcloud/api/endpoints/cell")).json()
    return any(row["revision"] == revision and row["state"] == "ready" for row in told["replicas"])


@pytest.mark.parametrize(
    ("source", "status", "words"),
    [
        ({"text": "def load(): ..."}, 400, "defines no predict()"),
        ({"text": "def load(:", "name": "Cell In[2]", "first_line": 2}, 400, "Cell In[2], line 2: SyntaxError"),
        ({"object": "../../../etc/passwd"}, 404, "there is no object"),
        ({"object": "0123456789abcdef"}, 404, "there is no object"),
        ({"first_line": 0}, 400, "first_line"),
    ],
)
async def test_code_that_cannot_be_served_is_refused_at_the_door(
    server: Server, source: dict[str, Any], status: int, words: str
) -> None:
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": "x", "name": "x", "source": source})
    assert answer.status_code == status and words in answer.json()["message"], answer.text


async def test_a_key_never_serves_code(server: Server) -> None:
    body = {"target": "x", "name": "x", "source": {"text": CELL}}
    answer = await server.ask("POST", "llmcloud/api/endpoints", body, await server.key("infer:*", "models:read"))
    assert answer.status_code == 403


async def test_an_engine_elsewhere_takes_a_models_name_and_never_a_key(server: Server) -> None:
    body = {"target": "org/big:7b", "engine": "https://api.example.org/v1", "api_key_env": "MY_KEY"}
    told = (await server.ask("POST", "llmcloud/api/endpoints", body)).json()
    assert (told["name"], told["engine"], told["kind"]) == ("big-7b", "https://api.example.org/v1", "generator")
    for wrong in ({"api_key_env": "sk-proj-secret"}, {"engine": "https://u:secret@x/v1"}):
        refused = await server.ask("POST", "llmcloud/api/endpoints", {**body, **wrong})
        assert refused.status_code == 400 and "secret" not in refused.text
