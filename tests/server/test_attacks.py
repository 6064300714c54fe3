"""What an attacker, or a client gone wrong, sends: each is refused with its status, quickly, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from jupyter_llmcloud.core.serving.keys import ApiKey, make_key, parse_key
from jupyter_llmcloud.server.api.base import MAX_BODY
from jupyter_llmcloud.server.gateway import handlers
from tests.server.test_gateway import error_of, in_flight, stream
from tests.server.test_server_access import PUBLIC, routes
from tests.support.plain_http import PLAIN
from tests.support.server_parts import Server, make_model, until

pytest_plugins = ["tests.support.server_fixtures"]
CANARY = "canary-7f3a9c"
CREDENTIALS = (
    "none",
    "wrong",
    "mistyped",
    "unknown",
    "other secret",
    "expired",
    "revoked",
    "other scope",
    "in the query",
)
QUICK_S = 0.05
OF_THE_KEY = ("/llmcloud/v1/files", "/llmcloud/v1/batches", "/llmcloud/v1/feedback", "/llmcloud/v1/responses/")
OF_THE_SERVER = {"/llmcloud/v1/openapi.json", "/llmcloud/v2", "/llmcloud/v2/health/live", "/llmcloud/v2/health/ready"}
LISTS = "/llmcloud/v2/repository/index"  # of what the key may ask


def assert_signs_nobody_in(answer: httpx.Response) -> None:
    """No cookie but that of Jupyter's own error pages, which lets nobody in; and nothing that a browser may guess about."""
    cookies = answer.headers.get_list("Set-Cookie")
    is_page = answer.headers.get("Content-Type", "").startswith("text/html")
    assert all(is_page and cookie.startswith("_xsrf=") for cookie in cookies), cookies
    assert answer.headers.get("X-Content-Type-Options") == "nosniff" or is_page


async def headers_with(server: Server, credential: str) -> tuple[dict[str, str], str]:
    """The headers and the query of a request."""
    now = time.time()
    key = await server.key("infer:nothing-of-all-this")
    known = parse_key(key)
    match credential:
        case "none":
            return {}, ""
        case "wrong":
            return {"Authorization": "Bearer 0123456789abcdef"}, ""
        case "mistyped":
            key = key[:-1] + ("0" if key[-1] != "0" else "1")
        case "unknown":
            key = make_key(b"never", b"x" * 32).text
        case "other secret":
            key = ApiKey(known.id, "A" * 43).text
        case "expired":
            server.context.state._change("UPDATE keys SET expires = ? WHERE id = ?", now - 1, known.id)
        case "revoked":
            server.context.state.revoke_key(known.id, now)
        case "in the query":
            return {}, f"?token={await server.key('infer:*', 'models:read')}"
    return {"Authorization": f"Bearer {key}"}, ""


@pytest.mark.parametrize("credential", CREDENTIALS)
async def test_every_route_and_method_refuses_whoever_may_not(server: Server, model: Path, credential: str) -> None:
    await server.serve(model)
    headers, query = await headers_with(server, credential)
    body = {"model": "tiny", "prompt": "hello", "messages": [], "scopes": ["infer:*"], "target": str(model)}
    keys = len(server.context.state.list_keys())
    for method, path, _ in routes():
        answer = await server.client.request(method, f"{server.url}{path}{query}", headers=headers, json=body)
        if path in PUBLIC:
            assert answer.status_code == 200
        elif "/v1" in path or "/v2" in path:
            expected = 401
            if credential == "other scope":  # of a key that is valid
                is_nowhere = answer.status_code == 404 and "/versions/name" in path  # whatever the model is
                expected = (
                    200 if path in {*OF_THE_SERVER, LISTS} else 404 if path.endswith("/nothing") or is_nowhere else 403
                )
                assert path != LISTS or answer.json() == []
                if path.startswith(OF_THE_KEY):  # what it made itself, which is nothing
                    expected = answer.status_code if answer.status_code in (400, 403, 404) else 200
                    assert expected != 200 or answer.json()["data"] == []
            assert answer.status_code == expected, f"{method} {path}: {answer.status_code} {answer.text[:200]}"
            if "/v1" in path and expected != 200:
                error_of(answer, expected)
        else:
            assert answer.status_code == 403, f"{method} {path}: {answer.status_code}"
        assert_signs_nobody_in(answer)
    assert len(server.context.state.list_keys()) == keys and server.context.endpoints.get("tiny").is_active
    assert (await server.stats())["asked"] == 0


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, _ in routes() if "/keys" in path])
async def test_a_key_never_mints_rotates_revokes_or_lists_keys_wherever_it_is_put(
    server: Server, method: str, path: str
) -> None:
    key = await server.key("infer:*", "models:read")
    url = f"{server.url}{path.replace('name', key.split('-')[2])}"
    before = server.context.state.list_keys()
    for headers, query in (
        ({"Authorization": f"Bearer {key}"}, ""),
        ({"Authorization": f"token {key}"}, ""),
        ({"X-Api-Key": key}, ""),
        ({"Cookie": f"token={key}"}, ""),
        ({"X-XSRFToken": key, "Cookie": f"_xsrf={key}"}, ""),
        ({}, f"?token={key}"),
    ):
        answer = await server.client.request(method, url + query, headers=headers, json={"scopes": ["infer:*"]})
        assert answer.status_code == 403, headers
    assert server.context.state.list_keys() == before


async def test_a_key_in_the_query_is_refused_also_beside_a_valid_one_and_is_not_logged(
    server: Server, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await server.serve(model)
    key = await server.key()
    with caplog.at_level(logging.DEBUG):
        for query in (f"token={key}", f"api_key={key}", f"x=1&y={key}", f"a=%73k{key[2:]}", key):
            for headers in ({}, {"Authorization": f"Bearer {key}"}, {"Authorization": f"token {server.token}"}):
                answer = await server.client.get(f"{server.url}/llmcloud/v1/models?{query}", headers=headers)
                assert error_of(answer, 401)["code"] == "key_in_query"
    ours = [record for record in caplog.records if record.name.startswith(("tornado", "ServerApp", "jupyter"))]
    assert ours and not [record for record in ours if key.split("-")[3] in record.getMessage()]


@pytest.mark.parametrize("body", [{"scopes": ["infer:*"]}, "scopes=infer:*"])
async def test_a_change_by_cookie_needs_the_xsrf_token_on_every_route(server: Server, model: Path, body: Any) -> None:
    await server.serve(model)
    async with httpx.AsyncClient(trust_env=False, verify=PLAIN, timeout=20) as browser:
        await browser.get(f"{server.url}/llmcloud/api/status?token={server.token}")  # signs in: sets the cookie
        assert (await browser.get(f"{server.url}/llmcloud/api/keys")).status_code == 200
        for method, path, _ in routes():
            if method in ("GET", "HEAD"):
                continue
            sent = (
                {"json": body}
                if isinstance(body, dict)
                else {"content": body, "headers": {"Content-Type": "text/plain"}}
            )
            answer = await browser.request(method, f"{server.url}{path}", **sent)
            assert answer.status_code == 403, f"{method} {path}: {answer.status_code}"
    assert server.context.state.list_keys() == []
    assert (await server.stats())["asked"] == 0


# --- names ---

TRAVERSALS = (
    "%2e%2e", "..%2fruns-secret", "%2e%2e%2fruns-secret", "%252e%252e%252fruns-secret",
    "..%5cruns-secret", "%2fetc%2fpasswd", "C:%5cx", "a%00b", "%00", "run%23x", "runs-secret%2frun.json", "-rf",
    "a%0d%0aSet-Cookie:%20x=1", "%f0%28%8c%28", "x" * 129, "..;", "%c0%ae%c0%ae", "~root", "$HOME", "'%20OR%201=1--",
)  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSALS)
async def test_no_name_leads_out_of_where_such_things_are(
    server: Server, model: Path, own_root: Path, name: str
) -> None:
    await server.serve(model)
    secret = own_root / "runs-secret"  # whose name begins like that of the folder of the runs
    secret.mkdir()
    (secret / "run.json").write_text(json.dumps({"run_id": "runs-secret", "name": CANARY, "state": "finished"}))
    (own_root / "runs").mkdir(exist_ok=True)
    (own_root / "runs" / "outside").symlink_to(own_root)
    base = urlsplit(server.url)
    for method, path, _ in routes():
        if "/name" not in path:
            continue
        raw = path.replace("/name", f"/{name}").encode("ascii", "ignore")
        url = httpx.URL(f"http://{base.netloc}").copy_with(raw_path=base.path.encode() + raw)
        headers = {"Authorization": f"token {server.token}"}
        answer = await server.client.request(method, url, headers=headers, json={})
        known = answer.status_code in (400, 404, 405, 422) or (answer.status_code, method) == (302, "GET")
        assert known, f"{method} {raw!r}: {answer.status_code} {answer.text[:200]}"
        assert CANARY not in answer.text and "root:x" not in answer.text and "x=1" not in str(answer.headers)
    assert secret.is_dir() and (own_root / "server.sqlite").exists()
    assert server.context.endpoints.get("tiny").is_active


@pytest.mark.parametrize("name", ["../x", "a/b", "a\0b", "..", "-x", "x" * 129, "a b", "<b>", "é"])
async def test_names_in_bodies_are_checked_too(server: Server, model: Path, name: str) -> None:
    for path, body in (
        ("endpoints", {"target": str(model), "name": name}),
        ("clusters", {"name": name}),
        ("runs", {"source": "pass", "spec": {"name": name}}),
    ):
        answer = await server.ask("POST", f"llmcloud/api/{path}", body)
        assert answer.status_code == 400, f"{path}: {answer.text}"
    error_of(await server.complete("hello", model=name), 404)
    assert error_of(await server.complete("hello", await server.key("infer:*"), model=name), 404)["param"] == "model"


# --- models ---


class Canary:
    """Whose unpickling leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "weights",
    [
        header(b"{}", 1 << 63), header(b"{}", 1 << 40), header(b"{", 1), header(b"[]"), header(b"{}", 0), b"", b"\0" * 7,
        header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e99]}}') + b"1234",
        header(b'{"a":{"dtype":"F32","shape":[1]}}') + b"1234",
        header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    ],
)  # fmt: skip
async def test_weights_whose_header_lies_are_refused_before_a_process_is_started(
    server: Server, model: Path, weights: bytes
) -> None:
    (model / "model.safetensors").write_bytes(weights)
    began = time.perf_counter()
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), "name": "tiny"})
    assert answer.status_code == 422 and answer.json()["error"] == "ModelError", answer.text
    assert time.perf_counter() - began < 1 and not server.agent.processes


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pkl", "../weights.safetensors", "/w.safetensors"]
)
async def test_pickles_are_never_loaded_nor_weights_from_elsewhere(server: Server, model: Path, name: str) -> None:
    trace = model.parent / "ran"
    pickled = pickle.dumps(Canary(trace))
    (model / Path(name).name).write_bytes(pickled)
    index = {"weight_map": {"a": "model.safetensors", "b": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), "name": "tiny"})
    assert answer.status_code == 422 and name.rpartition("/")[2] in answer.json()["message"]
    (model / "model.safetensors.index.json").unlink()
    (model / "model.safetensors").unlink()
    if not name.endswith(".safetensors"):
        answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": str(model), "name": "tiny"})
        assert answer.status_code == 422 and "has no *.safetensors file" in answer.json()["message"]
    assert not trace.exists() and not server.agent.processes


# --- bodies ---

DEEP = 10_000
BODIES = {
    "two megabytes": (b'{"model": "tiny", "prompt": "' + b"x" * 2_000_000 + b'"}', 413),
    "deep where it is read": (b'{"model": ' + b"[" * DEEP + b"]" * DEEP + b"}", 400),
    "deep in what the replica reads": (b'{"messages": ' + b"[" * DEEP + b"]" * DEEP + b', "model": "tiny"}', 400),
    "deep objects": (b'{"x":' * DEEP + b"1" + b"}" * DEEP, 400),
    "truncated": (b'{"model": "tiny", "prompt": "hel', 400),
    "truncated in a list": (b'{"model": "tiny", "messages": [{"role": "user"', 400),
    "another encoding": ('{"model": "tiny", "prompt": "é"}'.encode("utf-16"), 400),
    "a lone surrogate": (b'{"model": "\\ud800"}', 400),
    "zeros": (b"\0" * 1000, 400),
    "a form": (b"model=tiny&prompt=x", 400),
    "a model of a megabyte": (b'{"model": "' + b"m" * 1_000_000 + b'"}', 404),
    "a number of many digits": (b'{"model": "tiny", "max_tokens": ' + b"9" * 100_000 + b', "prompt": 1', 400),
}


@pytest.mark.alone
@pytest.mark.parametrize("case", BODIES)
async def test_a_body_of_nonsense_is_refused_quickly_and_other_streams_do_not_notice(
    server: Server, model: Path, case: str
) -> None:
    await server.serve(model)
    body, status = BODIES[case]
    key = await server.key("infer:*")
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
    url = f"{server.url}/llmcloud/v1/completions"
    async with stream(server, "count 60", key) as other:
        reading = asyncio.ensure_future(other.aread())
        await until(lambda: in_flight() == 1, "the other stream has begun")
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            error_of(await server.client.post(url, content=body, headers=headers), status)
            seconds.append(time.perf_counter() - began)
        received = await reading
    assert min(seconds) < QUICK_S, seconds  # the best of five: the client is in this very loop
    assert received.count(b"data: ") == 61 and received.endswith(b"data: [DONE]\n\n")
    assert (await server.complete("hello", key)).status_code == 200


@pytest.mark.alone
async def test_ten_megabytes_are_refused_before_they_have_come_and_the_client_sees_it(
    server: Server, model: Path
) -> None:
    await server.serve(model)
    key = await server.key()
    body = b'{"model": "tiny", "prompt": "' + b"x" * 10_000_000 + b'"}'
    answer = await server.client.post(
        f"{server.url}/llmcloud/v1/completions", content=body, headers={"Authorization": f"Bearer {key}"}
    )
    assert error_of(answer, 413)["code"] == "request_too_large"
    base = urlsplit(server.url)
    seconds = []
    for _ in range(5):
        reader, writer = await asyncio.open_connection(base.hostname, base.port)
        head = f"POST {base.path}/llmcloud/v1/completions HTTP/1.1\r\nHost: {base.netloc}\r\n"
        began = time.perf_counter()
        writer.write(f"{head}Content-Length: {len(body)}\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 10)
        seconds.append(time.perf_counter() - began)
        writer.close()
    assert min(seconds) < QUICK_S, seconds


@pytest.mark.parametrize("size", [0, 600_000, 12_000_000])
@pytest.mark.parametrize("credential", ["none", "revoked", "in the query"])
async def test_who_is_refused_reads_why_whatever_was_sent_and_may_ask_again_on_the_same_connection(
    server: Server, model: Path, credential: str, size: int
) -> None:
    await server.serve(model)
    headers, query = await headers_with(server, credential)
    body = json.dumps({"model": "tiny", "prompt": "hello " + "x" * size}).encode()
    base, good = urlsplit(server.url), {"Authorization": f"Bearer {await server.key()}"}
    reader, writer = await asyncio.open_connection(base.hostname, base.port)

    async def ask(headers: dict[str, str], query: str, body: bytes) -> tuple[int, dict[str, str]]:
        lines = [f"POST {base.path}/llmcloud/v1/completions{query} HTTP/1.1", f"Host: {base.netloc}"]
        lines += [f"{name}: {value}" for name, value in headers.items()] + [f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        async with asyncio.timeout(20):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            told = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in head[1:] if line}
            await reader.readexactly(int(told["content-length"]))
        return int(head[0].split()[1]), told

    status, told = await ask(headers, query, body)
    assert status == 401 and told["www-authenticate"] == "Bearer" and told["x-request-id"].startswith("req-")
    if told.get("connection") != "close":
        assert (await ask(good, "", b'{"model": "tiny", "prompt": "hello"}'))[0] == 200
    assert (told.get("connection") == "close") is (size > MAX_BODY)
    writer.close()


async def test_a_body_that_comes_too_slowly_is_not_waited_for(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "BODY_TIMEOUT_S", 0.3)
    await server.serve(model)
    base = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(base.hostname, base.port)
    head = f"POST {base.path}/llmcloud/v1/completions HTTP/1.1\r\nHost: {base.netloc}\r\nContent-Length: 1000\r\n"
    writer.write(f"{head}Authorization: Bearer {await server.key()}\r\n\r\n{{".encode())
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    assert in_flight() == 0 and (await server.complete("hello")).status_code == 200


async def test_a_client_that_does_not_read_is_cut_and_its_replica_freed(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "SLOW_READER_S", 0.5)
    await server.serve(model)
    base = urlsplit(server.url)
    body = json.dumps({"model": "tiny", "prompt": "flood 100000", "stream": True}).encode()
    _, writer = await asyncio.open_connection(base.hostname, base.port, limit=1024)
    head = (
        f"POST {base.path}/llmcloud/v1/completions HTTP/1.1\r\nHost: {base.netloc}\r\nContent-Length: {len(body)}\r\n"
    )
    writer.write(f"{head}Authorization: Bearer {await server.key()}\r\n\r\n".encode() + body)
    await until(lambda: in_flight() == 1, "it is asked")
    await until(lambda: in_flight() == 0, "it is cut")
    await until(lambda: _is_free(server), "the replica has stopped")
    writer.close()


async def _is_free(server: Server) -> bool:
    return (await server.stats())["active"] == 0


async def test_requests_with_the_same_id_are_two_requests(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    body = {"model": "tiny", "prompt": "count 5", "stream": True}
    headers = {"X-Request-Id": "req-same", "Idempotency-Key": "same"}
    asked = [server.ask("POST", "llmcloud/v1/completions", body, key, headers=headers) for _ in range(8)]
    answers = await asyncio.gather(*asked)
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
    ids = {answer.headers["X-Request-Id"] for answer in answers}
    assert len(ids) == 8 and all(re.fullmatch("req-[0-9a-f]{32}", one) for one in ids)


NO_LENGTHS = {
    **{value: value for value in ("-1", "0, 5", "1e3", "99999999999999999999", "+5", "0x5")},
    "5000 digits": "9" * 5000,
    "superscript": "\u00b2",
}


@pytest.mark.parametrize("value", NO_LENGTHS.values(), ids=NO_LENGTHS)
async def test_a_length_that_is_none_is_refused(server: Server, value: str) -> None:
    base = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(base.hostname, base.port)
    head = f"POST {base.path}/llmcloud/v1/completions HTTP/1.1\r\nHost: {base.netloc}\r\nContent-Length: {value}\r\n"
    writer.write(f"{head}Authorization: Bearer {await server.key()}\r\n\r\n{{}}".encode("latin-1"))
    first = await asyncio.wait_for(reader.readline(), 10)
    assert re.match(rb"HTTP/1.1 4\d\d ", first) or first == b""
    writer.close()


async def test_html_comes_back_as_json_that_no_browser_takes_for_a_page(server: Server, model: Path) -> None:
    await server.serve(model)
    page = "<script>alert(1)</script>"
    for answer in (
        await server.complete(page, await server.key()),
        await server.complete("hello", model=page),
        await server.ask("GET", f"llmcloud/v1/{page}"),
        await server.ask("POST", "llmcloud/api/keys", {"scopes": [page]}),
        await server.ask("GET", f"llmcloud/api/runs/{page}"),
    ):
        assert answer.headers["Content-Type"].startswith(("application/json", "text/html")) and (
            answer.headers["X-Content-Type-Options"] == "nosniff"
        )
        if answer.headers["Content-Type"].startswith("text/html"):  # Jupyter's own page of what it does not know
            assert page not in answer.text


async def test_what_is_said_and_who_says_it_is_nowhere_in_the_logs(
    server: Server, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await server.serve(model)
    key = await server.key()
    with caplog.at_level(logging.DEBUG):
        await server.complete(CANARY, key)
        await server.complete(CANARY, key, model="nothing")
        await server.complete("die", key, user=CANARY)
        await server.ask("POST", "llmcloud/v1/completions", {"model": 3, "prompt": CANARY}, key)
        await server.ask(
            "POST", "llmcloud/v1/chat/completions", {"messages": [{"role": "user", "content": CANARY}]}, key
        )
        content = f'{{"model": "tiny", "prompt": "{CANARY}'.encode()
        headers = {"Authorization": f"Bearer {key}"}
        await server.client.post(f"{server.url}/llmcloud/v1/completions", content=content, headers=headers)
        async with stream(server, f"end after 2 {CANARY} 2", key) as answer:
            await answer.aread()
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    text = "\n".join(logging.Formatter().format(record) for record in ours)
    assert CANARY not in text and key.split("-")[3] not in text
    await server.context.requests.write()
    kept = b"".join(file.read_bytes() for file in server.context.state.path.parent.glob("*sqlite*"))
    assert CANARY.encode() not in kept and key.split("-")[3].encode() not in kept


async def test_the_folder_of_a_model_may_be_named_but_not_with_a_nul(server: Server, own_root: Path) -> None:
    folder = make_model(own_root.parent / "model")
    answer = await server.ask("POST", "llmcloud/api/endpoints", {"target": f"{folder}\0.safe", "name": "tiny"})
    assert answer.status_code == 400
