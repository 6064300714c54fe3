"""Plain requests with a key need no handler of Jupyter's, and nobody can tell the difference."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from jupyter_llmcloud.server.gateway.handlers import InferenceHandler
from jupyter_llmcloud.server.gateway.keyed.known_keys import KnownKeys
from jupyter_llmcloud.storage.server_state import ServerState, StoredKey
from tests.support.server_parts import Server, until

pytest_plugins = ["tests.support.server_fixtures"]

OF_ONE_ANSWER = {"date", "x-request-id", "x-ratelimit-reset-requests", "x-ratelimit-remaining-requests"}


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The routes of the requests that a handler took."""
    taken: list[str] = []
    initialize = InferenceHandler.initialize

    def noted(self: Any, **services: Any) -> None:
        taken.append(self.request.path.rpartition("/")[2])
        initialize(self, **services)

    monkeypatch.setattr(InferenceHandler, "initialize", noted)
    return taken


def shown(answer: Any) -> tuple[int, dict[str, str], str]:
    """What of an answer is the same for the same request."""
    headers = {name: value for name, value in answer.headers.items() if name not in OF_ONE_ANSWER}
    return answer.status_code, headers, answer.text


async def test_the_second_request_needs_no_handler_and_is_answered_alike(
    server: Server, model: Path, handled: list[str]
) -> None:
    await server.serve(model)
    key = await server.key("infer:tiny", requests_per_minute=100)
    port = urlsplit(server.url).port
    for host, stream in (("127.0.0.1", False), ("localhost", True)):  # each is new to the server
        handled.clear()
        asked: Any = {"model": "tiny", "prompt": "count 3", "stream": stream}
        named = {"Host": f"{host}:{port}"}
        first, second = [
            await server.ask("POST", "llmcloud/v1/completions", asked, key, headers=named) for _ in range(2)
        ]
        assert handled == ["completions"]
        assert shown(first) == shown(second)
        assert set(second.headers) >= OF_ONE_ANSWER
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
    await server.context.requests.write()
    rows = [server.context.state.request(one.headers["x-request-id"]) for one in (first, second)]
    same = ("actor", "endpoint", "route", "status", "outcome", "prompt_tokens", "completion_tokens")
    assert len({tuple(row[name] for name in same) for row in rows if row is not None}) == 1


async def test_what_is_refused_is_refused_by_the_handler(server: Server, model: Path, handled: list[str]) -> None:
    await server.serve(model)
    key, other = await server.key("infer:*"), await server.key("infer:other")
    limited = await server.key("infer:tiny", requests_per_minute=1)
    assert (await server.complete("hello", key)).status_code == 200
    assert (await server.complete("hello", limited)).status_code == 200
    handled.clear()
    refused = [
        (await server.complete("hello", key, model="none"), 404),
        (await server.complete("hello", other), 403),
        (await server.complete("hello", limited), 429),
        (await server.complete("hello", key, stream="yes"), 400),
        (await server.complete("hello", f"{key[:-9]}-{key[-8:]}"[:-1]), 401),
        (await server.ask("POST", "llmcloud/v1/completions", [1], key=key), 400),
    ]
    for number, (answer, status) in enumerate(refused):
        assert answer.status_code == status, (number, answer.text)
        assert answer.json()["error"]["message"] and answer.headers["Content-Type"] == "application/json"
    assert len(handled) == len(refused)


@pytest.mark.parametrize(
    "more", ["Origin: https://example.org", "X-Api-Key: x", "Transfer-Encoding: chunked", "Connection: close"]
)
async def test_what_is_not_plain_is_left_to_the_handler(
    server: Server, model: Path, handled: list[str], more: str
) -> None:
    await server.serve(model)
    key = await server.key()
    assert (await server.complete("hello", key)).status_code == 200
    name, _, value = more.partition(": ")
    handled.clear()
    headers = {"Authorization": f"Bearer {key}", **({} if "Transfer" in name else {name: value})}
    content = b'{"model": "tiny", "prompt": "hello"}'

    async def pieces() -> Any:
        yield content

    url = f"{server.url}/llmcloud/v1/completions"
    answer = await server.client.post(url, content=pieces() if "Transfer" in name else content, headers=headers)
    assert answer.status_code in (200, 403) and handled == ["completions"]


async def test_a_replica_that_cannot_answer_is_told_in_the_same_words(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    answers = []
    for _ in range(2):
        answers.append(await server.complete("die", key))
        await until(lambda: server.context.endpoints.get("tiny").ready_replicas(), "the replica is back")
    assert [answer.status_code for answer in answers] == [503, 503]
    first, second = (answer.json()["error"] for answer in answers)
    assert (first["code"], first["type"]) == (second["code"], second["type"])
    assert "Retry-After" in answers[1].headers


async def test_who_hangs_up_before_or_within_the_answer_is_noticed(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    assert (await server.complete("hello", key)).status_code == 200
    for prompt in ("wait", "endless"):
        asked = asyncio.ensure_future(server.complete(prompt, key, stream=True))
        await until(lambda: _num_active(server, 1), "the replica answers")
        asked.cancel()
        await until(lambda: _num_active(server, 0), "the replica stops")
    assert (await server.complete("hello", key)).status_code == 200


def test_a_key_that_another_server_has_changed_is_read_again(tmp_path: Path) -> None:
    mine, other = ServerState(tmp_path / "server.sqlite"), ServerState(tmp_path / "server.sqlite")
    known, key = KnownKeys(mine), StoredKey("abcdefgh", "digest", "", ["infer:*"], "ada", 0.0, None, None)
    mine.add_key(key)
    put = known.put("its text", key, mine.stamp())
    assert known.get("its text") is put and put.key is key and known.get("another text") is None
    other.revoke_key("abcdefgh", 1.0)
    assert known.get("its text") is None
    mine.close()
    other.close()


def test_a_key_is_looked_at_again_when_usage_was_written_and_never_ends_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "root"
    state = ServerState(folder / "server.sqlite")
    known, read = KnownKeys(state), []
    for name in ("abcdefgh", "hgfedcba"):
        state.add_key(StoredKey(name, "digest", "", ["infer:*"], "ada", 0.0, None, None))
    kept = [state.key(name) for name in ("abcdefgh", "hgfedcba")]
    used, unused = (known.put(key.id, key, state.stamp()) for key in kept if key is not None)
    unused.used_at -= 60
    state.prune_usage(0.0)
    state.register_server("one", 1, 0.0, headless=False)  # whatever is written
    read_key = ServerState.key
    monkeypatch.setattr(ServerState, "key", lambda self, key_id: read.append(key_id) or read_key(self, key_id))
    known.look_again()
    assert read == ["abcdefgh"] and known.is_current(used) and read == ["abcdefgh"]
    state.revoke_key("abcdefgh", 1.0)
    known.look_again()
    assert not known.is_current(used) and known.is_current(unused)
    shutil.rmtree(folder)
    known.look_again()
    state.close()


async def _num_active(server: Server, number: int) -> bool:
    return (await server.stats())["active"] == number
