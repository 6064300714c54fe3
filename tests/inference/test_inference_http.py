"""The routes of a replica over a real tiny model, and over an engine that a test can hold still."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from jupyter_llmcloud.inference.app import Application, ReplicaStatus
from jupyter_llmcloud.inference.engines.base import EngineError, EngineStats, Generation, Sampling, TokenStream
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from jupyter_llmcloud.inference.engines.select import open_engine
from jupyter_llmcloud.inference.openai.completion import ServedModel
from tests.support.tiny_models import CHAT_TEMPLATE, one_thread, save_tiny_llama

TOKEN = "the-bearer"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
DEADLINE_S = 30.0
Client = TestClient[Any, Any]


class HeldEngine:
    """An engine whose steps are taken by the test: each gives every open sequence one of `tokens`."""

    name = "held"
    unsupported: frozenset[str] = frozenset()
    context_length = 64
    num_parallel = 8
    num_threads = 1

    def __init__(self, tokens: list[int]) -> None:
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.streams: list[TokenStream] = []
        self.generations: list[Generation] = []
        self._tokens = tokens
        self._num_tokens = 0

    def submit(self, generation: Generation) -> TokenStream:
        if self.failure:
            raise EngineError(self.failure)
        stream = TokenStream(lambda: self.streams.remove(stream))
        self.streams.append(stream)
        self.generations.append(generation)
        return stream

    def step(self, *, last: bool = False) -> None:
        for stream in list(self.streams):
            token = self._tokens[self._num_tokens % len(self._tokens)]
            self._num_tokens += 1
            stream.push([token], [], "length" if last else None)
            if last:
                self.streams.remove(stream)

    def stats(self) -> EngineStats:
        return EngineStats(len(self.streams), self._num_tokens)

    async def close(self) -> None:
        for stream in self.streams:
            stream.fail(EngineError("closed"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    return load_model(save_tiny_llama(folder, chat_template=CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def real(loaded: LoadedModel) -> Iterator[ServedModel]:
    engine = asyncio.run(open_engine(loaded, 8))
    yield ServedModel(loaded, engine, "tiny")
    asyncio.run(engine.close())


@pytest.fixture
def held(loaded: LoadedModel) -> ServedModel:
    return ServedModel(loaded, HeldEngine(loaded.tokenizer("The for statement")["input_ids"]), "tiny")


def serve(
    model: ServedModel | None,
    body: Callable[[Client, ReplicaStatus], Awaitable[None]],
    *,
    max_concurrent: int = 8,
    headers: dict[str, str] = HEADERS,
) -> None:
    async def run() -> None:
        status = ReplicaStatus("endpoint", "tiny", max_concurrent)
        application = Application(status, TOKEN)
        if model is not None:
            application.model, status.state = model, "ready"
        server = TestServer(application.build(), handler_cancellation=True)
        async with TestClient(server, headers=headers) as client, asyncio.timeout(DEADLINE_S):
            await body(client, status)

    asyncio.run(run())


async def settles(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def events(response: Any) -> list[Any]:
    lines = (await response.text()).split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def ask(**fields: Any) -> dict[str, Any]:
    return {"json": {"model": "tiny", "temperature": 0, **fields}}


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


def test_a_completion_has_openais_shape_and_the_models_words(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        response = await client.post("/v1/completions", **ask(prompt="The for", max_tokens=12))
        reply = await response.json()
        tokens = [t async for b in real.engine.submit(greedy(real, "The for", 12)) for t in b.tokens]
        assert response.status == 200
        assert reply["id"].startswith("cmpl-")
        assert (reply["object"], reply["model"], type(reply["created"])) == ("text_completion", "tiny", int)
        (choice,) = reply["choices"]
        assert choice == {"index": 0, "text": choice["text"], "logprobs": None, "finish_reason": "length"}
        assert choice["text"] == real.loaded.tokenizer.decode(tokens)
        counted = {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}
        assert reply["usage"] == {**counted, "prompt_tokens_details": {"cached_tokens": 0}}

    serve(real, body)


def greedy(model: ServedModel, prompt: str, count: int) -> Generation:
    return Generation(model.loaded.tokenizer(prompt)["input_ids"], count, Sampling(temperature=0.0))


def test_every_form_of_prompt_gives_choices_in_order(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        texts = ["The for", "A function definition"]
        ids = [real.loaded.tokenizer(text)["input_ids"] for text in texts]
        by_text = await (await client.post("/v1/completions", **ask(prompt=texts, n=2))).json()
        by_ids = await (await client.post("/v1/completions", **ask(prompt=ids, n=2))).json()
        one = await (await client.post("/v1/completions", **ask(prompt=ids[1]))).json()
        answers = [choice["text"] for choice in by_text["choices"]]
        assert [choice["index"] for choice in by_text["choices"]] == [0, 1, 2, 3]
        assert answers == [choice["text"] for choice in by_ids["choices"]]
        assert answers[0] == answers[1]
        assert answers[2] == answers[3] == one["choices"][0]["text"]
        assert by_text["usage"]["completion_tokens"] == 4 * 16

    serve(real, body)


def test_a_chat_stream_has_a_role_first_and_one_finish_reason_per_choice(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        fields = {"messages": said("The for"), "max_tokens": 10, "n": 2}
        whole = await (await client.post("/v1/chat/completions", **ask(**fields))).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await client.post("/v1/chat/completions", **ask(**fields, **options))
        *chunks, usage, done = await events(response)
        assert response.content_type == "text/event-stream"
        assert done == "[DONE]"
        assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
        assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, usage]}) == 1
        assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
        for index in range(2):
            mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert mine[0]["delta"]["role"] == "assistant"
            assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"]
            text = "".join(c["delta"].get("content", "") for c in mine)
            assert text == whole["choices"][index]["message"]["content"]

    serve(real, body)


def test_the_usage_tells_what_of_a_prompt_did_not_have_to_be_read_again(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        for route, fields, names in (
            ("completions", {"prompt": [7, 8] * 35, "n": 2, "max_tokens": 4}, ("prompt", "prompt")),
            ("responses", {"input": "a text of more than one block " * 3, "max_output_tokens": 4}, ("input", "input")),
        ):
            told = [(await (await client.post(f"/v1/{route}", **ask(**fields))).json())["usage"] for _ in range(2)]
            assert told[0][f"{names[0]}_tokens"] == told[1][f"{names[0]}_tokens"] > 64
            assert [one[f"{names[1]}_tokens_details"]["cached_tokens"] for one in told] == [0, 64]

    serve(real, body)


@pytest.mark.parametrize(
    ("route", "fields"), [("completions", {"prompt": "The"}), ("chat/completions", {"messages": said("The")})]
)
def test_each_chunk_tells_the_usage_so_far_where_that_is_asked(real: ServedModel, route: str, fields: Any) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        response = await client.post(f"/v1/{route}", **ask(**fields, max_tokens=6, **options))
        *chunks, last, _ = await events(response)
        so_far = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert so_far == sorted(so_far) and so_far[-1] == last["usage"]["completion_tokens"] == 6
        assert all(
            chunk["usage"]["total_tokens"] == chunk["usage"]["prompt_tokens"] + n
            for chunk, n in zip(chunks, so_far, strict=True)
        )
        options["stream_options"]["include_usage"] = False
        refused = await client.post(f"/v1/{route}", **ask(**fields, **options))
        assert (await refused.json())["error"]["param"] == "stream_options.continuous_usage_stats"

    serve(real, body)


def test_a_completion_stream_without_usage_says_nothing_of_it(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        whole = await (await client.post("/v1/completions", **ask(prompt="The"))).json()
        response = await client.post("/v1/completions", **ask(prompt="The", stream=True))
        *chunks, done = await events(response)
        assert done == "[DONE]"
        assert all("usage" not in chunk for chunk in chunks)
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == whole["choices"][0]["text"]
        assert [c["choices"][0]["finish_reason"] for c in chunks[-2:]] == [None, "length"]

    serve(real, body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(real: ServedModel, stream: bool) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        free = await (await client.post("/v1/completions", **ask(prompt="The for", max_tokens=40))).json()
        text = free["choices"][0]["text"]
        stop = text[11:16]
        fields = ask(prompt="The for", max_tokens=40, stop=["@@@@", stop], stream=stream)
        response = await client.post("/v1/completions", **fields)
        if stream:
            chunks = [chunk["choices"][0] for chunk in (await events(response))[:-1]]
            shown, reason = "".join(c["text"] for c in chunks), chunks[-1]["finish_reason"]
        else:
            (choice,) = (await response.json())["choices"]
            shown, reason = choice["text"], choice["finish_reason"]
        assert (shown, reason) == (text[: text.index(stop)], "stop")
        await settles(lambda: real.engine.stats().num_active == 0)

    serve(real, body)


def test_the_chat_template_of_the_model_is_used(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        templated = "<|system|>Be brief.\n<|user|>The for\n<|assistant|>"
        messages = [{"role": "developer", "content": "Be brief."}, *said("The for")]
        fields = {"max_tokens": 8}
        chat = await (await client.post("/v1/chat/completions", **ask(messages=messages, **fields))).json()
        plain = await (await client.post("/v1/completions", **ask(prompt=templated, **fields))).json()
        assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]

    serve(real, body)


def test_logprobs_are_worded_as_each_route_does(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}
        chat = await (await client.post("/v1/chat/completions", **ask(messages=said("The"), **fields))).json()
        content = chat["choices"][0]["logprobs"]["content"]
        assert len(content) == 3
        assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in content)
        assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in content)
        reply = await (await client.post("/v1/completions", **ask(prompt="The", logprobs=1))).json()
        logprobs = reply["choices"][0]["logprobs"]
        assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        assert {len(values) for values in logprobs.values()} == {16}

    serve(real, body)


def test_a_seed_repeats_an_answer_and_tells_choices_apart(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        fields = ask(prompt="The", n=3, seed=11)
        fields["json"]["temperature"] = 1.5
        first = await (await client.post("/v1/completions", **fields)).json()
        again = await (await client.post("/v1/completions", **fields)).json()
        texts = [choice["text"] for choice in first["choices"]]
        assert texts == [choice["text"] for choice in again["choices"]]
        assert len(set(texts)) == 3

    serve(real, body)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("completions", {"prompt": "x" * 600}, "prompt"),
        ("completions", {"prompt": "x" * 200_000}, "prompt"),
        ("completions", {"prompt": "x", "max_tokens": 256}, "max_tokens"),
        ("chat/completions", {"messages": said("x" * 600)}, "messages"),
        ("chat/completions", {"messages": said("x"), "max_completion_tokens": 256}, "max_completion_tokens"),
    ],
)
def test_what_does_not_fit_the_context_is_a_400_with_both_numbers(
    real: ServedModel, path: str, fields: dict[str, Any], param: str
) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        response = await client.post(f"/v1/{path}", **ask(**fields))
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert "256" in error["message"]
        assert error["type"] == "invalid_request_error"

    serve(real, body)


def test_a_chat_answer_may_fill_the_rest_of_the_context(held: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        asking = asyncio.create_task(client.post("/v1/chat/completions", **ask(messages=said("x"))))
        engine = held.engine
        assert isinstance(engine, HeldEngine)
        await settles(lambda: bool(engine.generations))
        (generation,) = engine.generations
        assert generation.max_tokens == 64 - len(generation.prompt)
        engine.step(last=True)
        assert (await asking).status == 200

    serve(held, body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt": [1, 999]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": []}, "prompt")],
)
def test_tokens_that_the_model_does_not_know_are_refused(real: ServedModel, fields: dict[str, Any], param: str) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        response = await client.post("/v1/completions", **ask(**fields))
        assert (response.status, (await response.json())["error"]["param"]) == (400, param)

    serve(real, body)


def test_another_models_name_is_a_404(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        response = await client.post("/v1/completions", json={"model": "gpt-5", "prompt": "x"})
        assert (response.status, (await response.json())["error"]["code"]) == (404, "model_not_found")

    serve(real, body)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}])
def test_everything_but_livez_needs_the_token(real: ServedModel, headers: dict[str, str]) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        assert (await client.get("/livez")).status == 200
        for path in ("/readyz", "/stats", "/v1/models", "/nowhere"):
            assert (await client.get(path)).status == 401
        response = await client.post("/v1/completions", **ask(prompt="x"))
        assert (response.status, (await response.json())["error"]["code"]) == (401, "invalid_api_key")

    serve(real, body, headers=headers)


def test_wrong_routes_methods_and_sizes_have_the_same_error_shape(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        for response, expected in (
            (await client.get("/v1/nowhere"), 404),
            (await client.get("/v1/completions"), 405),
            (await client.post("/v1/completions", data=b" " * (17 * 2**20)), 413),
            (await client.post("/v1/completions", data=b"{"), 400),
        ):
            assert response.status == expected
            assert set((await response.json())["error"]) == {"message", "type", "param", "code"}

    serve(real, body)


def test_until_the_model_is_loaded_requests_are_asked_to_come_back() -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        ready = await client.get("/readyz")
        assert (ready.status, (await ready.json())["state"]) == (503, "loading")
        response = await client.post("/v1/completions", **ask(prompt="x"))
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        status.state, status.reason = "failed", "no such file"
        failed = await client.get("/readyz")
        assert (failed.status, (await failed.json())["reason"]) == (500, "no such file")

    serve(None, body)


def test_a_full_replica_answers_429_and_recovers(held: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        engine = held.engine
        assert isinstance(engine, HeldEngine)
        asking = [asyncio.create_task(client.post("/v1/completions", **ask(prompt="x", n=2))) for _ in "12"]
        await settles(lambda: status.num_sequences == 4)
        refused = await client.post("/v1/completions", **ask(prompt="x"))
        assert (refused.status, (await refused.json())["error"]["code"]) == (429, "overloaded")
        assert refused.headers["retry-after-ms"] == "1000"
        impossible = await client.post("/v1/completions", **ask(prompt=["x"] * 5))
        assert impossible.status == 400
        engine.step(last=True)
        assert [(await task).status for task in asking] == [200, 200]
        assert (status.num_sequences, status.num_open, status.num_refused) == (0, 0, 1)

    serve(held, body, max_concurrent=1)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_the_engine_and_every_gauge(held: ServedModel, stream: bool, n: int) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        engine = held.engine
        assert isinstance(engine, HeldEngine)
        fields = ask(prompt="x", stream=stream, n=n)
        asking = asyncio.create_task(client.post("/v1/completions", **fields))
        await settles(lambda: len(engine.streams) == n)
        engine.step()
        if stream:
            response = await asking
            await response.content.readany()
            response.close()
        else:
            asking.cancel()
        await settles(lambda: not engine.streams and status.num_open == 0)
        assert (status.num_sequences, status.num_cancelled) == (0, 1)

    serve(held, body)


def test_a_stream_whose_engine_fails_ends_with_an_error_event_and_no_done(held: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        engine = held.engine
        assert isinstance(engine, HeldEngine)
        response = asyncio.create_task(client.post("/v1/completions", **ask(prompt="x", stream=True, n=2)))
        await settles(lambda: len(engine.streams) == 2)
        engine.step()
        engine.streams[0].fail(EngineError("out of memory"))
        *chunks, last = await events(await response)
        assert chunks
        assert last["error"]["message"] == "out of memory"
        await settles(lambda: status.num_open == 0)
        assert (status.num_failed, status.num_sequences) == (1, 0)

    serve(held, body)


def test_a_stream_ends_with_an_error_event_whatever_goes_wrong_in_it(held: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        asked = {"model": "tiny", "prompt": "The for", "max_tokens": 8, "stream": True}
        async with client.post("/v1/completions", json=asked) as response:
            engine = held.engine
            await settles(lambda: bool(engine.streams))
            engine.step()
            engine.streams[0].fail(ValueError("Invalid prefix encountered"))
            got = await events(response)
        assert got[-1]["error"]["code"] == "internal"
        assert "ValueError: Invalid prefix encountered" in got[-1]["error"]["message"]
        assert (status.num_open, status.num_sequences, status.num_failed) == (0, 0, 1)

    serve(held, body)


def test_what_a_request_has_cost_can_be_asked_after_it_ended_also_when_it_was_cut(held: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        engine = held.engine
        asked = {"model": "tiny", "prompt": "The for", "max_tokens": 8, "stream": True}
        async with client.post("/v1/completions", json=asked, headers={"X-Request-Id": "req-1"}) as response:
            await settles(lambda: bool(engine.streams))
            engine.step()
            asking = asyncio.ensure_future(client.get("/usage/req-1"))
            engine.step(last=True)
            await response.read()
        usage = await (await asking).json()
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 2)
        async with client.post("/v1/completions", json=asked, headers={"X-Request-Id": "req-2"}) as response:
            await settles(lambda: bool(engine.streams))
            engine.step()
            await response.content.readany()
            response.close()
        usage = await (await client.get("/usage/req-2")).json()
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 1)
        assert (await client.get("/usage/req-3")).status == 404

    serve(held, body)


def test_an_engine_that_fails_before_the_first_byte_is_a_503(held: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        engine = held.engine
        assert isinstance(engine, HeldEngine)
        asking = asyncio.create_task(client.post("/v1/completions", **ask(prompt="x")))
        await settles(lambda: bool(engine.streams))
        engine.streams[0].fail(EngineError("out of memory"))
        assert (await asking).status == 503
        engine.failure = "dead"
        assert (await client.post("/v1/completions", **ask(prompt="x"))).status == 503

    serve(held, body)


def test_a_slow_reader_gets_joined_chunks(held: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        stream = held.engine.submit(Generation([1], 5))
        engine = held.engine
        assert isinstance(engine, HeldEngine)
        for _ in range(3):
            engine.step()
        assert len((await anext(stream)).tokens) == 3

    serve(held, body)


def test_stats_count_requests_and_tokens(real: ServedModel) -> None:
    async def body(client: Client, status: ReplicaStatus) -> None:
        await client.post("/v1/completions", **ask(prompt="The for", max_tokens=5))
        stats = await (await client.get("/stats")).json()
        assert (stats["num_requests"], stats["num_prompt_tokens"], stats["num_generated_tokens"]) == (1, 2, 5)
        assert (stats["num_open"], stats["num_sequences"], stats["engine"]["num_active"]) == (0, 0, 0)
        models = await (await client.get("/v1/models")).json()
        assert [entry["id"] for entry in models["data"]] == ["tiny"]

    serve(real, body)
