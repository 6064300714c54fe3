"""Batches: every row answered once and in order, whatever happens to replicas and servers; nobody's but their owner's."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jupyter_llmcloud.server.batches import batches as service
from jupyter_llmcloud.server.batches.asking import RowAnswer
from jupyter_llmcloud.server.batches.runner import BatchRunner
from jupyter_llmcloud.storage.serving.batches import BatchFolder, BatchStore, RowResult, StoredBatch
from jupyter_llmcloud.storage.serving.uploads import FileStore
from tests.server.test_rollouts import make_adapter
from tests.support.server_parts import Server, until

pytest_plugins = ["tests.support.server_fixtures"]
URL = "/v1/completions"


def rows(*prompts: str, model: str = "tiny", url: str = URL) -> bytes:
    lines = [
        {"custom_id": f"row-{number}", "method": "POST", "url": url, "body": {"model": model, "prompt": prompt}}
        for number, prompt in enumerate(prompts)
    ]
    return b"\n".join(json.dumps(line).encode() for line in lines)


class Client:
    """What OpenAI's clients do, with a key of its own."""

    def __init__(self, server: Server, key: str) -> None:
        self.server = server
        self.key = key

    async def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return await self.server.ask(method, f"llmcloud/v1/{path}", body, self.key)

    async def upload(self, content: bytes, purpose: str = "batch") -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        url = f"{self.server.url}/llmcloud/v1/files"
        return await self.server.client.post(
            url, headers=headers, files={"file": ("in.jsonl", content)}, data={"purpose": purpose}
        )

    async def begin(self, content: bytes, **more: Any) -> dict[str, Any]:
        file = (await self.upload(content)).json()
        answer = await self.ask("POST", "batches", {"input_file_id": file["id"], "endpoint": URL, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def batch(self, batch_id: str) -> dict[str, Any]:
        return (await self.ask("GET", f"batches/{batch_id}")).json()

    async def ended(self, batch_id: str) -> dict[str, Any]:
        async def is_over() -> bool:
            return (await self.batch(batch_id))["status"] in ("completed", "failed", "expired", "cancelled")

        await until(is_over, "the batch is over")
        return await self.batch(batch_id)

    async def lines(self, file_id: str) -> list[dict[str, Any]]:
        content = (await self.ask("GET", f"files/{file_id}/content")).text
        return [json.loads(line) for line in content.splitlines()]


@pytest.fixture
def client(server: Server, model: Path, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Client:
    """With a key to the endpoint `tiny`."""

    async def make() -> Client:
        await server.serve(model)
        return Client(server, await server.key())

    return jp_asyncio_loop.run_until_complete(make())


async def test_every_row_is_answered_once_and_in_the_order_of_the_input(client: Client) -> None:
    prompts = [f"prompt {number}" for number in range(70)]
    batch = await client.ended((await client.begin(rows(*prompts), metadata={"for": "me"}))["id"])
    assert batch["status"] == "completed" and batch["metadata"] == {"for": "me"}
    assert batch["request_counts"] == {"total": 70, "completed": 70, "failed": 0}
    assert batch["usage"] == {"input_tokens": 210, "output_tokens": 350, "total_tokens": 560}
    lines = await client.lines(batch["output_file_id"])
    assert [line["custom_id"] for line in lines] == [f"row-{number}" for number in range(70)]
    texts = [line["response"]["body"]["choices"][0]["text"] for line in lines]
    assert texts == [f"{prompt}!" for prompt in prompts]
    assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in lines)
    assert batch["error_file_id"] is None


async def test_openais_own_client_runs_a_batch(client: Client) -> None:
    url = f"{client.server.url}/llmcloud/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=client.key, max_retries=0) as theirs:
        file = await theirs.files.create(file=("in.jsonl", rows("a", "b")), purpose="batch")
        batch = await theirs.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        await client.ended(batch.id)
        batch = await theirs.batches.retrieve(batch.id)
        assert batch.status == "completed" and batch.request_counts.completed == 2
        text = (await theirs.files.content(batch.output_file_id)).text
        assert [json.loads(line)["custom_id"] for line in text.splitlines()] == ["row-0", "row-1"]
        assert [one.id async for one in theirs.batches.list()] == [batch.id]
        assert {one.id async for one in theirs.files.list()} == {file.id, batch.output_file_id}
        assert (await theirs.files.delete(file.id)).deleted


async def test_a_row_of_an_endpoint_that_keeps_requests_can_be_judged_as_any_other(server: Server, model: Path) -> None:
    """Its answer was not kept, and a thumb for it made no row of the data set."""
    await server.serve(model, keep_requests=True)
    client = Client(server, await server.key())
    batch = await client.ended((await client.begin(rows("hello", "what")))["id"])
    first, _ = [line["response"]["request_id"] for line in await client.lines(batch["output_file_id"])]
    said = await client.ask("POST", "feedback", {"request_id": first, "rating": "up"})
    assert said.status_code == 200, said.text
    told = (await server.ask("GET", "llmcloud/api/endpoints/tiny/feedback/dataset")).text
    assert json.loads(told) == {"prompt": "hello", "completion": "hello!", "request_id": first, "rating": 1.0}


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (rows("a", "b") + b"\nnonsense", "invalid_json_line", 3),
        (rows("a") + b"\n" + rows("b"), "duplicate_custom_id", 2),
        (rows("a", model="other"), "scope_missing", 1),
        (rows("a", url="/v1/chat/completions"), "invalid_url", 1),
        (b"\n\n", "empty_file", None),
    ],
)
async def test_an_input_that_is_wrong_is_refused_by_its_line_and_nothing_is_asked(
    client: Client, content: bytes, code: str, line: int | None
) -> None:
    batch = await client.ended((await client.begin(content))["id"])
    assert batch["status"] == "failed"
    [problem] = batch["errors"]["data"]
    assert (problem["code"], problem["line"]) == (code, line)
    assert (await client.server.stats())["asked"] == 0


@pytest.mark.parametrize("name", ["tiny:legal", "legal"])
async def test_rows_may_name_an_adapter_as_other_requests_do(
    client: Client, model: Path, tmp_path: Path, name: str
) -> None:
    adapter = make_adapter(tmp_path / "legal", model)
    added = await client.server.ask("POST", "llmcloud/api/endpoints/tiny/adapters", {"target": str(adapter)})
    assert added.status_code == 201, added.text
    batch = await client.ended((await client.begin(rows("a", "b", model=name)))["id"])
    assert batch["status"] == "completed", batch
    assert (await client.server.stats())["asked"] == 2


async def test_rows_that_the_replica_refuses_for_now_are_asked_again_and_cancelled_with_the_batch(
    client: Client,
) -> None:
    batch = await client.begin(rows("a", "busy", "b"))

    async def all_but_one() -> bool:
        return (await client.batch(batch["id"]))["request_counts"]["completed"] == 2

    await until(all_but_one, "two rows are answered")
    assert (await client.ask("POST", f"batches/{batch['id']}/cancel")).json()["status"] == "cancelling"
    ended = await client.ended(batch["id"])
    assert ended["status"] == "cancelled"
    assert [line["custom_id"] for line in await client.lines(ended["output_file_id"])] == ["row-0", "row-2"]
    [missing] = await client.lines(ended["error_file_id"])
    assert missing["custom_id"] == "row-1" and missing["error"]["code"] == "batch_cancelled"
    again = await client.ask("POST", f"batches/{batch['id']}/cancel")
    assert again.status_code == 400 and "cancelled already" in again.json()["error"]["message"]


async def test_rows_that_are_given_up_with_their_batch_are_no_faults_of_the_endpoint(client: Client) -> None:
    """They were written down as 500, counted against the replica, and left an alert."""
    batch = await client.begin(rows("wait"))

    async def is_asked() -> bool:
        return (await client.server.stats())["active"] == 1

    await until(is_asked, "the row is asked")
    await client.ask("POST", f"batches/{batch['id']}/cancel")
    await client.ended(batch["id"])
    await client.server.context.requests.write()
    [row] = client.server.context.state.usage()
    assert (row["status"], row["outcome"]) == (499, "hung up")


async def test_what_a_key_has_made_no_other_key_sees(client: Client) -> None:
    batch = await client.ended((await client.begin(rows("a")))["id"])
    other = Client(client.server, await client.server.key("infer:*"))
    for path in (
        f"batches/{batch['id']}",
        f"files/{batch['output_file_id']}",
        f"files/{batch['input_file_id']}/content",
    ):
        answer = await other.ask("GET", path)
        assert answer.status_code == 404, path
    assert (await other.ask("GET", "batches")).json()["data"] == []
    taken = await other.ask("POST", "batches", {"input_file_id": batch["input_file_id"], "endpoint": URL})
    assert taken.status_code == 404
    mine = await client.server.ask("GET", f"llmcloud/v1/batches/{batch['id']}")  # a Jupyter user
    assert mine.json()["id"] == batch["id"]


async def test_a_key_that_opens_no_endpoint_begins_nothing(client: Client) -> None:
    reader = Client(client.server, await client.server.key("models:read"))
    assert (await reader.upload(rows("a"))).status_code == 403


async def test_what_is_wrong_with_a_form_or_a_batch_is_said(client: Client) -> None:
    assert "purpose" in (await client.upload(rows("a"), "fine-tune")).json()["error"]["message"]
    wrong = await client.ask("POST", "files", {"file": "x"})
    assert wrong.status_code == 400 and "multipart" in wrong.json()["error"]["message"]
    file = (await client.upload(rows("a"))).json()["id"]
    for body, hint in (
        ({"input_file_id": file, "endpoint": "/v1/models"}, "/v1/models"),
        ({"input_file_id": file, "endpoint": URL, "completion_window": "soon"}, "completion_window"),
        ({"endpoint": URL}, "input_file_id"),
    ):
        answer = await client.ask("POST", "batches", body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and hint in error["message"] and error["code"] == "invalid_value"
        assert error["param"] in (hint, None)
    assert (await client.ask("POST", "batches", {"input_file_id": "file-no", "endpoint": URL})).status_code == 404
    begun = await client.ask("POST", "batches", {"input_file_id": file, "endpoint": URL, "completion_window": "30m\n"})
    assert begun.json()["completion_window"] == "30m"


async def test_files_are_listed_by_purpose_and_in_the_order_that_is_asked_for(client: Client) -> None:
    first = (await client.upload(rows("a"))).json()["id"]
    batch = await client.ended((await client.begin(rows("b")))["id"])
    made = batch["output_file_id"]

    async def listed(query: str) -> list[str]:
        return [row["id"] for row in (await client.ask("GET", f"files?{query}")).json()["data"]]

    assert await listed("purpose=batch_output") == [made] and made not in await listed("purpose=batch")
    assert await listed("order=asc") == (await listed(""))[::-1]
    assert await listed("order=asc&limit=1") == [first]
    assert await listed(f"order=asc&purpose=batch_output&after={first}") == []
    refused = await client.ask("GET", "files?order=up")
    assert refused.status_code == 400 and "asc" in refused.json()["error"]["message"]


async def test_a_field_of_the_form_that_is_not_known_is_refused_by_its_name(client: Client) -> None:
    answer = await client.server.client.post(
        f"{client.server.url}/llmcloud/v1/files", headers={"Authorization": f"Bearer {client.key}"},
        files={"file": ("in.jsonl", rows("a"))},
        data={"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
    )  # fmt: skip
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_after")


async def test_forms_and_bodies_may_come_compressed(client: Client) -> None:
    headers = {"Authorization": f"Bearer {client.key}", "Content-Encoding": "gzip"}
    form = httpx.Request("POST", "http://x", files={"file": ("in.jsonl", rows("a"))}, data={"purpose": "batch"})
    url, kind = f"{client.server.url}/llmcloud/v1", form.headers["Content-Type"]
    posted = client.server.client.post
    file = await posted(f"{url}/files", content=gzip.compress(form.read()), headers={**headers, "Content-Type": kind})
    assert file.status_code == 200, file.text
    body = json.dumps({"input_file_id": file.json()["id"], "endpoint": URL}).encode()
    batch = await posted(f"{url}/batches", content=gzip.compress(body), headers=headers)
    assert batch.status_code == 200, batch.text
    assert (await client.ended(batch.json()["id"]))["status"] == "completed"
    assert (await posted(f"{url}/batches", content=body, headers=headers)).status_code == 400


async def test_a_batch_ends_when_its_key_is_revoked(client: Client) -> None:
    batch = await client.begin(rows("wait"))

    async def is_asked() -> bool:
        return (await client.server.stats())["active"] == 1

    await until(is_asked, "the row is asked")
    await client.server.ask("DELETE", f"llmcloud/api/keys/{client.key.split('-')[2]}")
    user = Client(client.server, client.server.token)
    ended = await user.ended(batch["id"])
    assert ended["status"] == "failed" and ended["errors"]["data"][0]["code"] == "invalid_api_key"


# --- without a server: the runner over a stand-in of the endpoints ---


class Endpoints:
    """Answers every prompt with itself, except those it is told to hold."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.held: set[str] = set()
        self.dies_of: set[str] = set()
        self.num_places = 8
        self.num_waiting = 0
        self.changed = asyncio.Event()

    def has(self, models: list[str]) -> bool:
        return True

    def endpoint_of(self, model: str) -> str:
        return model

    def may_ask(self, key_id: str | None, endpoint: str) -> bool:
        return True

    def places(self, models: list[str]) -> tuple[int, int]:
        return self.num_places, self.num_waiting

    async def ask(self, row: Any, route: str, owner: str, key_id: str | None) -> RowAnswer:
        prompt = row.body["prompt"]
        self.asked.append(prompt)
        self.changed.set()
        if prompt in self.dies_of:
            return RowAnswer("req-1", 503, b'{"error": {}}', "replica_lost", 0.0)
        if prompt in self.held:
            await asyncio.Event().wait()
        return RowAnswer("req-1", 200, json.dumps({"text": prompt}).encode())


def make_batch(root: Path, content: bytes) -> BatchFolder:
    folder = BatchStore(root).create()
    folder.input.write_bytes(content)
    folder.save(StoredBatch(folder.path.name, "me", None, URL, "file-1", 1.0, 1e12))
    assert folder.lock()
    return folder


def runner(root: Path, folder: BatchFolder, endpoints: Endpoints) -> BatchRunner:
    import logging

    return BatchRunner(folder, folder.read(), endpoints, FileStore(root), lambda batch: None, logging.getLogger())


async def test_a_row_that_is_finished_is_not_repeated_by_the_next_server(tmp_path: Path) -> None:
    folder, endpoints = make_batch(tmp_path, rows("a", "b", "c", "d")), Endpoints()
    endpoints.held = {"c"}
    first = asyncio.ensure_future(runner(tmp_path, folder, endpoints).run())
    await until(lambda: len(folder.offsets()) == 3, "three rows are over")
    first.cancel()  # the server ends
    await asyncio.gather(first, return_exceptions=True)
    with (folder.path / "results.jsonl").open("ab") as results:
        results.write(b'{"row": 2, "ok"')  # and is killed while it writes
    endpoints.held, endpoints.asked = set(), []
    after = BatchStore(tmp_path).folder(folder.path.name)
    assert after.lock()
    second = runner(tmp_path, after, endpoints)
    await second.run()
    assert endpoints.asked == ["c"] and second.batch.status == "completed"
    lines = FileStore(tmp_path).path(second.batch.output_file_id).read_text().splitlines()
    assert [json.loads(line)["response"]["body"]["text"] for line in lines] == ["a", "b", "c", "d"]


async def test_one_server_at_a_time_works_on_a_batch(tmp_path: Path) -> None:
    folder = make_batch(tmp_path, rows("a"))
    other = BatchStore(tmp_path).folder(folder.path.name)
    assert not other.lock()
    folder.unlock()
    assert other.lock()
    other.unlock()


async def test_no_row_begins_while_others_wait_for_an_answer(tmp_path: Path) -> None:
    folder, endpoints = make_batch(tmp_path, rows("a", "b")), Endpoints()
    endpoints.num_waiting = 1
    task = asyncio.ensure_future(runner(tmp_path, folder, endpoints).run())
    await until(lambda: folder.read().status == "in_progress", "it has begun")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(endpoints.changed.wait(), 0.6)
    endpoints.num_waiting = 0
    await task
    assert endpoints.asked == ["a", "b"]


async def test_a_row_that_replicas_die_of_fails_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jupyter_llmcloud.server.batches import runner as module

    monkeypatch.setattr(module, "back_off_s", lambda tries, after: 0.0)
    folder, endpoints = make_batch(tmp_path, rows("a", "poison", "b")), Endpoints()
    endpoints.dies_of = {"poison"}
    working = runner(tmp_path, folder, endpoints)
    await working.run()
    assert working.batch.status == "completed" and endpoints.asked.count("poison") == 3
    assert (working.batch.num_completed, working.batch.num_failed) == (2, 1)
    [error] = FileStore(tmp_path).path(working.batch.error_file_id).read_text().splitlines()
    assert json.loads(error)["custom_id"] == "row-1" and json.loads(error)["response"]["status_code"] == 503


def test_a_torn_line_costs_its_row_only(tmp_path: Path) -> None:
    folder = make_batch(tmp_path, rows("a", "b"))
    folder.add(RowResult(0, True, {"custom_id": "row-0"}))
    folder.unlock()
    with (folder.path / "results.jsonl").open("ab") as results:
        results.write(b'{"row": 1,')
    again = BatchStore(tmp_path).folder(folder.path.name)
    again.add(RowResult(1, True, {"custom_id": "row-1"}))
    assert [result.line["custom_id"] for result in again.results()] == ["row-0", "row-1"]
    again.unlock()


def test_batches_can_be_to_every_route_that_generates() -> None:
    assert {"/v1/completions", "/v1/chat/completions"} <= set(service.URLS)
