"""Feedback: kept with the request it judges, by whoever asked that; what comes of it is a data set, and drift."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from jupyter_llmcloud.storage.server_state import RequestRecord
from jupyter_llmcloud.storage.serving.feedback import Feedback, FeedbackStore, KeptRequest
from tests.support.server_parts import Server

pytest_plugins = ["tests.support.server_fixtures"]


async def say(server: Server, key: str | None, **said: Any) -> httpx.Response:
    return await server.ask("POST", "llmcloud/v1/feedback", said, key)


async def dataset(server: Server) -> list[dict[str, Any]]:
    text = (await server.ask("GET", "llmcloud/api/endpoints/tiny/feedback/dataset")).text
    return [json.loads(line) for line in text.splitlines()]


async def test_corrections_and_good_answers_of_kept_requests_make_a_data_set(server: Server, model: Path) -> None:
    await server.serve(model, keep_requests=True)
    key = await server.key()
    good = (await server.complete("hello", key)).headers["X-Request-Id"]
    wrong = (await server.complete("what", key)).headers["X-Request-Id"]
    messages = [{"role": "user", "content": "count 3"}]
    body = {"model": "tiny", "messages": messages, "stream": True}
    streamed = (await server.ask("POST", "llmcloud/v1/chat/completions", body, key)).headers["X-Request-Id"]
    assert (await say(server, key, request_id=good, rating="up")).json()["rating"] == 1.0
    await say(server, key, request_id=wrong, rating=-0.5, correction="that")
    await say(server, key, request_id=streamed, rating="up", metadata={"page": "demo"})
    rows = {row.pop("request_id"): row for row in await dataset(server)}
    assert rows == {
        good: {"prompt": "hello", "completion": "hello!", "rating": 1.0},
        wrong: {"prompt": "what", "completion": "that", "rating": -0.5},
        streamed: {"messages": [*messages, {"role": "assistant", "content": "0 1 2 "}], "rating": 1.0},
    }
    told = (await server.ask("GET", "llmcloud/api/endpoints/tiny/feedback")).json()["feedback"]
    assert [row["metadata"] for row in told][:1] == [{"page": "demo"}]


async def test_what_is_said_of_an_answer_whose_row_is_just_being_written_waits_for_it(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a 404, "no request was answered here", where a client is quick and the disk is not."""
    await server.serve(model)
    key = await server.key()
    requests = server.context.requests
    write_down, write = requests.book.write, requests.write
    is_writing, feedback_came, disk_is_free = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow_disk(records: Sequence[RequestRecord]) -> None:
        is_writing.set()
        await disk_is_free.wait()
        await write_down(records)

    async def asked() -> None:
        asyncio.get_running_loop().call_soon(feedback_came.set)
        await write()

    monkeypatch.setattr(requests.book, "write", slow_disk)
    monkeypatch.setattr(requests, "write", asked)
    request_id = (await server.complete("hello", key)).headers["X-Request-Id"]
    await asyncio.wait_for(is_writing.wait(), 30)
    said = asyncio.create_task(say(server, key, request_id=request_id, rating="up"))
    await asyncio.wait_for(feedback_came.wait(), 30)
    disk_is_free.set()
    assert (await said).status_code == 200


async def test_nothing_is_kept_unless_the_endpoint_was_started_so(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    request_id = (await server.complete("a secret question", key)).headers["X-Request-Id"]
    assert (await say(server, key, request_id=request_id, rating="up")).status_code == 200
    assert await dataset(server) == []
    files = server.context.state.path.parent.glob("*sqlite*")
    assert all(b"a secret question" not in file.read_bytes() for file in files)
    await say(server, key, request_id=request_id, rating="up", prompt="a question", answer="an answer")
    [row] = await dataset(server)  # what the client tells by itself; the last word counts
    assert (row["prompt"], row["completion"]) == ("a question", "an answer")
    await say(server, key, request_id=request_id, correction="a better answer", metadata={"from": "a form"})
    await say(server, key, request_id=request_id, comment="what was said before stays")
    [row] = await dataset(server)
    assert (row["prompt"], row["completion"], row["rating"]) == ("a question", "a better answer", 1.0)
    [told] = (await server.ask("GET", "llmcloud/api/endpoints/tiny/feedback")).json()["feedback"]
    assert told["metadata"] == {"from": "a form"} and told["comment"] == "what was said before stays"


async def test_a_key_judges_its_own_requests_only(server: Server, model: Path) -> None:
    await server.serve(model)
    request_id = (await server.complete("hello", await server.key())).headers["X-Request-Id"]
    answer = await say(server, await server.key(), request_id=request_id, rating="up")
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "request_id"
    assert (await say(server, None, request_id=request_id, rating="up")).status_code == 200  # a Jupyter user


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ({"rating": 2}, "rating is 2"),
        ({"rating": "good"}, "rating"),
        ({}, "say something"),
        ({"rating": "up", "request_id": "req-nothing"}, "no request 'req-nothing'"),
        ({"rating": "up", "correction": "x" * 300_000}, "correction has 300000 characters"),
        ({"rating": "down", "correction": " \n"}, "correction is empty"),  # a form that was left empty
    ],
    ids=["a rating of 2", "a word", "nothing", "an unknown request", "a long correction", "an empty correction"],
)
async def test_what_is_no_feedback_is_refused(server: Server, model: Path, said: dict[str, Any], hint: str) -> None:
    await server.serve(model)
    key = await server.key()
    request_id = (await server.complete("hello", key)).headers["X-Request-Id"]
    answer = await say(server, key, **{"request_id": request_id, **said})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404) and hint in error["message"] and error["param"]


async def test_an_endpoint_that_is_asked_other_things_than_before_has_drifted(server: Server, model: Path) -> None:
    await server.serve(model)

    def record(number: int, prompt_tokens: int) -> RequestRecord:
        return RequestRecord(
            f"req-{number}", "me", "tiny", "completions", 200, 0.1,
            first_byte_s=0.01, prompt_tokens=prompt_tokens, completion_tokens=number % 20, t=float(number),
        )  # fmt: skip

    server.context.state.add_usage([record(number, 10 + number % 7) for number in range(300)])
    server.context.state.add_usage([record(number, 200 + number % 7) for number in range(300, 400)])
    for number in range(280, 400):
        rating = 1.0 if number < 300 else -1.0
        server.context.keeper.store.add(Feedback(f"req-{number}", "me", float(number), "tiny", rating))
    drift = (await server.ask("GET", "llmcloud/api/endpoints/tiny/drift?recent=100")).json()["drift"]
    verdicts = {row["name"]: row["verdict"] for row in drift}
    assert verdicts["prompt_tokens"] == "major" and verdicts["completion_tokens"] == "none"
    assert verdicts["rating"] == "unknown"  # 20 earlier ratings are too few
    assert next(row for row in drift if row["name"] == "rating")["mean_recent"] == -1.0


def test_what_cannot_be_a_row_is_left_out(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "feedback.sqlite")
    tokens = json.dumps({"model": "m", "prompt": [1, 2, 3]}).encode()
    store.keep(KeptRequest("req-1", 1.0, "m", "r", "completions", tokens, b'{"choices": []}'))
    store.add(Feedback("req-1", "me", 1.0, "m", 1.0))
    store.add(Feedback("req-2", "me", 2.0, "m", None, comment="slow"))
    assert list(store.training_rows("m")) == []
    assert (tmp_path / "feedback.sqlite").stat().st_mode & 0o777 == 0o600
    store.close()


def events(*told: dict[str, Any]) -> bytes:
    return b"".join(b"event: x\ndata: " + json.dumps(one).encode() + b"\n\n" for one in told) + b"data: [DONE]\n\n"


SAID = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "message", "content": [{"type": "output_text", "text": "Good "}, {"type": "output_text", "text": "day"}]}]  # fmt: skip
BEGUN = {"index": 0, "delta": {"role": "assistant", "content": ""}}
CALLED = {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{}"}}]}}
DAY = {"role": "assistant", "content": "Good day"}
KEPT: dict[str, tuple[str, dict[str, Any], bytes, Any]] = {
    "a response": ("responses", {"input": "hi", "instructions": "Be kind"}, json.dumps({"output": SAID}).encode(),
                   {"messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "hi"}, DAY]}),
    "a response that was streamed": (
        "responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
        events({"type": "response.created", "response": {"output": []}},
               {"type": "response.completed", "response": {"output": SAID}}),
        {"messages": [{"role": "user", "content": "hi"}, DAY]},
    ),
    "a response that goes on from another": ("responses", {"input": "hi", "previous_response_id": "resp_1"},
                                             json.dumps({"output": SAID}).encode(), None),
    "a list of one prompt": ("completions", {"prompt": ["hi"]}, b'{"choices": [{"index": 0, "text": "Good day"}]}',
                             {"prompt": "hi", "completion": "Good day"}),
    "a call that was streamed": ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]},
                                 events({"choices": [BEGUN]}, {"choices": [CALLED]}).replace(b"event: x\n", b""), None),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_a_good_answer_is_a_row_of_what_was_asked_and_said(case: str, tmp_path: Path) -> None:
    route, asked, answer, row = KEPT[case]
    store = FeedbackStore(tmp_path / "feedback.sqlite")
    store.keep(KeptRequest("req-1", 1.0, "m", "r", route, json.dumps({"model": "m", **asked}).encode(), answer))
    store.add(Feedback("req-1", "me", 1.0, "m", 1.0))
    assert list(store.training_rows("m")) == ([{**row, "request_id": "req-1", "rating": 1.0}] if row else [])
    store.close()


async def test_feedback_on_what_was_not_kept_is_counted_aloud(
    server: Server, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jupyter_llmcloud.client.rest import ServerClient
    from jupyter_llmcloud.magics.serving.endpoint import Endpoint

    await server.serve(model)
    endpoint = Endpoint("tiny", ServerClient(server.url, server.token))
    for said in ({"correction": "hi"}, {"rating": "up", "prompt": "hello", "answer": "hi"}, {"rating": "down"}):
        request_id = (await server.complete("hello")).headers["X-Request-Id"]
        await asyncio.to_thread(functools.partial(endpoint.feedback, request_id, **said))
    assert await asyncio.to_thread(endpoint.feedback_dataset, str(tmp_path / "data.jsonl")) == 1
    assert "1 of 2 corrections and good answers are left out" in capsys.readouterr().out


async def test_the_handle_in_a_notebook_gives_feedback_and_writes_the_data_set(
    server: Server, model: Path, tmp_path: Path
) -> None:
    from jupyter_llmcloud.client.rest import ServerClient
    from jupyter_llmcloud.magics.serving.endpoint import Endpoint

    await server.serve(model, keep_requests=True)
    endpoint = Endpoint("tiny", ServerClient(server.url, server.token))
    request_id = (await server.complete("hello")).headers["X-Request-Id"]
    await asyncio.to_thread(lambda: endpoint.feedback(request_id, correction="hi", source="review"))
    assert await asyncio.to_thread(endpoint.feedback_dataset, str(tmp_path / "data.jsonl")) == 1
    assert json.loads((tmp_path / "data.jsonl").read_text())["completion"] == "hi"
    assert {row["verdict"] for row in await asyncio.to_thread(endpoint.drift)} == {"unknown"}


async def test_a_data_set_of_both_kinds_says_so_and_one_kind_can_be_chosen(
    server: Server, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jupyter_llmcloud.client.rest import ServerClient
    from jupyter_llmcloud.errors import UsageError
    from jupyter_llmcloud.magics.serving.endpoint import Endpoint

    await server.serve(model)
    endpoint = Endpoint("tiny", ServerClient(server.url, server.token))
    for prompt in ("hello", [{"role": "user", "content": "hello"}], [{"role": "user", "content": "you"}]):
        request_id = (await server.complete("hello")).headers["X-Request-Id"]
        said = {"rating": "up", "prompt": prompt, "answer": "hi"}
        await asyncio.to_thread(functools.partial(endpoint.feedback, request_id, **said))
    path = tmp_path / "data.jsonl"
    write = functools.partial(asyncio.to_thread, endpoint.feedback_dataset, str(path))
    assert await write() == 3
    assert "2 of kind 'chat', 1 of kind 'text'" in capsys.readouterr().out
    assert await write(kind="chat") == 2
    assert all("messages" in json.loads(line) for line in path.read_text().splitlines())
    assert await write(kind="text") == 1
    assert "completion" in json.loads(path.read_text())
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match="kind='words': it is chat or text"):
        await write(kind="words")
