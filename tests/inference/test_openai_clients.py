"""The OpenAI surface as OpenAI's own client uses it, over an engine whose answers the test writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp.test_utils import TestServer

from jupyter_llmcloud.inference.app import Application, ReplicaStatus
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from jupyter_llmcloud.inference.openai import prompt_length, prompts
from jupyter_llmcloud.inference.openai.chat.templates import Templates
from jupyter_llmcloud.inference.openai.completion import ServedModel
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_models import CHAT_TEMPLATE, save_tiny_llama

TOKEN = "the-bearer"
Body = Callable[[openai.AsyncOpenAI, ScriptedEngine], Awaitable[None]]
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOLS: Any = [{"type": "function", "function": WEATHER}]
CALL = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ASKED: Any = [{"role": "user", "content": "weather?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE, context_length=512)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def templates() -> Iterator[Templates]:
    renderer = Templates()
    renderer.prepare()
    yield renderer
    renderer.close()


@pytest.fixture
def serve(loaded: LoadedModel, templates: Templates) -> Callable[[str, Body], None]:
    def run(text: str, body: Body) -> None:
        async def main() -> None:
            status = ReplicaStatus("endpoint", "tiny", 8)
            application = Application(status, TOKEN)
            engine = ScriptedEngine(loaded, text)
            application.model, status.state = ServedModel(loaded, engine, "tiny", templates=templates), "ready"
            async with TestServer(application.build()) as server:
                client = openai.AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key=TOKEN, max_retries=0)
                async with client, asyncio.timeout(120):
                    await body(client, engine)

        asyncio.run(main())

    return run


def test_a_tool_is_called_whole_and_in_a_stream(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        reply = await client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS)
        choice = reply.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
        call = choice.message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
        stream = await client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, stream=True)
        parts = [chunk.choices[0] async for chunk in stream]
        calls = [part.delta.tool_calls[0] for part in parts if part.delta.tool_calls]
        assert (calls[0].id[:5], calls[0].function.name) == ("call_", "get_weather")
        assert json.loads("".join(part.function.arguments for part in calls)) == {"city": "Paris"}
        assert len(calls) > 3  # the arguments come while they are written
        assert [part.finish_reason for part in parts if part.finish_reason] == ["tool_calls"]

    serve(CALL, body)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_can_be_forced(serve: Any, choice: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        reply = await client.chat.completions.create(
            model="tiny", messages=ASKED, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False
        )
        call = reply.choices[0].message.tool_calls[0]
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")

    serve("never said", body)


def test_functions_are_called_as_before_there_were_tools(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        functions: Any = [WEATHER]
        reply = await client.chat.completions.create(model="tiny", messages=ASKED, functions=functions)
        choice = reply.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("function_call", "Let me see.")
        called = choice.message.function_call
        assert (called.name, json.loads(called.arguments)) == ("get_weather", {"city": "Paris"})
        assert choice.message.tool_calls is None
        stream = await client.chat.completions.create(model="tiny", messages=ASKED, functions=functions, stream=True)
        parts = [chunk.choices[0] async for chunk in stream]
        calls = [part.delta.function_call for part in parts if part.delta.function_call]
        assert calls[0].name == "get_weather"
        assert json.loads("".join(call.arguments for call in calls)) == {"city": "Paris"}
        assert [part.finish_reason for part in parts if part.finish_reason] == ["function_call"]
        forced = await client.chat.completions.create(
            model="tiny", messages=ASKED, functions=functions, function_call={"name": "get_weather"}
        )
        assert forced.choices[0].message.function_call.name == "get_weather"
        none = await client.chat.completions.create(
            model="tiny", messages=ASKED, functions=functions, function_call="none"
        )
        assert none.choices[0].message.function_call is None and "<tool_call>" in none.choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="exclude each other"):
            await client.chat.completions.create(model="tiny", messages=ASKED, functions=functions, tools=TOOLS)

    serve(CALL, body)


def test_only_tools_that_are_allowed_are_offered(serve: Any) -> None:
    time: Any = {"type": "function", "function": {"name": "get_time"}}
    tools: Any = [*TOOLS, time]

    def only(name: str, mode: str) -> Any:
        named = {"type": "function", "function": {"name": name}}
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}}

    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        reply = await client.chat.completions.create(
            model="tiny", messages=ASKED, tools=tools, tool_choice=only("get_time", "required")
        )
        assert [call.function.name for call in reply.choices[0].message.tool_calls] == ["get_time"]
        await client.chat.completions.create(
            model="tiny", messages=ASKED, tools=tools, tool_choice=only("get_time", "auto")
        )
        prompt = engine._loaded.tokenizer.decode(engine.generations[-1].prompt)
        assert "get_time" in prompt and "get_weather" not in prompt
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model="tiny", messages=ASKED, tools=tools, tool_choice=only("x", "auto")
            )
        assert caught.value.param == "tool_choice.allowed_tools.tools[0].function.name"
        choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}
        own: Any = [{"type": "function", **tool["function"]} for tool in tools]
        response = await client.responses.create(model="tiny", input="now?", tools=own, tool_choice=choice)
        assert [call.name for call in response.output] == ["get_time"]
        assert response.tool_choice.mode == "required" and len(response.tools) == 2

    serve("never said", body)


def test_an_answer_follows_a_schema_an_expression_or_a_choice(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        schema = {"name": "point", "schema": {"type": "object", "properties": {"x": {"enum": [1, 2]}},
                  "required": ["x"], "additionalProperties": False}, "strict": True}  # fmt: skip
        form: Any = {"type": "json_schema", "json_schema": schema}
        reply = await client.chat.completions.create(model="tiny", messages=ASKED, response_format=form)
        assert json.loads(reply.choices[0].message.content)["x"] in (1, 2)
        form = {"type": "regex", "pattern": "[ab]{3}/c"}
        reply = await client.chat.completions.create(model="tiny", messages=ASKED, response_format=form)
        assert set(reply.choices[0].message.content[:3]) <= {"a", "b"}
        extra = {"structured_outputs": {"choice": ["yes", "no"]}}
        completion = await client.completions.create(model="tiny", prompt="x", extra_body=extra)
        assert completion.choices[0].text in ("yes", "no")

    serve("never said", body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strin"}}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "regex", "pattern": "(["}}, "response_format.pattern"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0]"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 10**6}, "n"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"min_p": 2}, "min_p"),
        ({"audio": {"voice": "x"}}, "audio"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_400_that_names_the_place(serve: Any, fields: dict[str, Any], param: str) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/chat/completions", body={"model": "tiny", "messages": ASKED, **fields}, cast_to=object)
        assert caught.value.param == param
        assert engine.generations == []

    serve("", body)


def test_a_wrong_type_is_told_in_plain_words(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        messages: Any = [*ASKED, {"role": "user", "content": 3}]
        with pytest.raises(openai.BadRequestError, match="must be a string or a list of parts, not an integer"):
            await client.chat.completions.create(model="tiny", messages=messages)

    serve("", body)


def test_agent_histories_are_rendered_with_calls_and_their_results(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        call = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
        history: Any = [
            *ASKED,
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "thanks"},
        ]
        await client.chat.completions.create(model="tiny", messages=history)
        nulls = {"tools": None, "tool_choice": None, "response_format": None}
        await client.post("/chat/completions", body={"model": "tiny", "messages": ASKED, **nulls}, cast_to=object)
        prompt = engine._loaded.tokenizer.decode(engine.generations[0].prompt)
        assert '"name": "get", "arguments": {"a": 1}' in prompt
        assert "sunny" in prompt

    serve("you are welcome", body)


def test_everyday_extras_reach_the_engine_and_what_has_no_effect_is_said(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        extra = {"repetition_penalty": 1.2, "min_p": 0.1, "ignore_eos": True, "min_tokens": 3, "stop_token_ids": [5]}
        raw = await client.completions.with_raw_response.create(
            model="tiny", prompt="a", stop=["@"] * 16, extra_body={**extra, "store": True}
        )
        asked = engine.generations[0]
        assert (asked.sampling.repetition_penalty, asked.sampling.min_p) == (1.2, 0.1)
        assert (asked.ignore_eos, asked.min_tokens, asked.stop_token_ids) == (True, 3, (5,))
        assert raw.headers["X-LLMC-Without-Effect"] == "store"

    serve("b", body)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_log_likelihood_is_scored_as_lm_evaluation_harness_asks(serve: Any, loaded: Any, max_tokens: int) -> None:
    import torch

    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        prompt = loaded.tokenizer("The for statement")["input_ids"]
        reply = await client.completions.create(
            model="tiny", prompt=[prompt], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234
        )
        told = reply.choices[0].logprobs
        with torch.inference_mode():
            rows = loaded.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = [float(row[token]) for row, token in zip(rows, prompt[1:], strict=False)]
        assert told.token_logprobs[0] is None
        assert told.token_logprobs[1 : len(prompt)] == pytest.approx(expected, abs=1e-4)
        assert len(told.tokens) == len(prompt) + max_tokens
        assert reply.choices[0].text.startswith("The for statement")
        best = loaded.tokenizer.decode([int(rows[0].argmax())])
        assert max(told.top_logprobs[1], key=told.top_logprobs[1].get) == best

    serve("", body)


def test_a_response_streams_numbered_events_and_can_be_gone_on_from(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        first = await client.responses.create(model="tiny", input="Hello", instructions="Be brief.")
        assert (first.status, first.output_text, first.usage.output_tokens > 0) == ("completed", "Good day", True)
        assert first.id.startswith("resp_")
        stream = await client.responses.create(model="tiny", input="More", previous_response_id=first.id, stream=True)
        events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        stream_id = events[0].response.id
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        ]  # fmt: skip
        assert kinds[-4:] == [
            "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
        ]  # fmt: skip
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Good day"
        prompt = engine._loaded.tokenizer.decode(engine.generations[-1].prompt)
        assert "Hello" in prompt and "Good day" in prompt and "Be brief." not in prompt
        again = await client.responses.retrieve(first.id)
        assert (again.output_text, again.status) == (first.output_text, "completed")
        with pytest.raises(openai.NotFoundError, match="previous_response_id"):
            await client.responses.create(model="tiny", input="x", previous_response_id="resp_unknown")
        with pytest.raises(openai.NotFoundError):  # of another key
            await client.responses.create(
                model="tiny", input="x", previous_response_id=first.id, extra_headers={"X-LLMC-Key": "other"}
            )
        with pytest.raises(openai.NotFoundError, match="not known here"):
            await client.responses.retrieve(first.id, extra_headers={"X-LLMC-Key": "other"})
        pages = client.responses.input_items
        both = await pages.list(stream_id, order="asc")
        texts = [(item.role, item.content[0].text) for item in both.data]
        assert texts == [("user", "Hello"), ("assistant", "Good day"), ("user", "More")]
        newest = await pages.list(stream_id, limit=1)
        assert newest.data[0].id == both.data[-1].id and newest.has_more
        in_pages = [item.id async for item in pages.list(stream_id, limit=1)]
        assert in_pages == [item.id for item in reversed(both.data)]
        for asked in ({"limit": 0}, {"after": "nothing"}, {"order": "up"}):
            with pytest.raises(openai.BadRequestError) as caught:
                await pages.list(stream_id, **asked)  # type: ignore[arg-type]
            assert caught.value.param == next(iter(asked))
        with pytest.raises(openai.NotFoundError):
            await pages.list(stream_id, extra_headers={"X-LLMC-Key": "other"})
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError, match="not known here"):
            await client.responses.retrieve(first.id)

    serve("Good day", body)


def test_a_response_calls_functions(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        tools: Any = [{"type": "function", **WEATHER}]
        whole = await client.responses.create(model="tiny", input="weather?", tools=tools)
        calls = [item for item in whole.output if item.type == "function_call"]
        assert (calls[0].name, json.loads(calls[0].arguments)) == ("get_weather", {"city": "Paris"})
        stream = await client.responses.create(model="tiny", input="weather?", tools=tools, stream=True)
        kinds = [event.type async for event in stream]
        assert "response.function_call_arguments.delta" in kinds and "response.function_call_arguments.done" in kinds
        output: Any = [{"type": "function_call_output", "call_id": calls[0].call_id, "output": "sunny"}]
        await client.responses.create(model="tiny", input=output, previous_response_id=whole.id)
        assert "sunny" in engine._loaded.tokenizer.decode(engine.generations[-1].prompt)
        told = await client.responses.create(model="tiny", input=output, previous_response_id=whole.id)
        items = (await client.responses.input_items.list(told.id, order="asc")).data
        assert [item.type for item in items][:3] == ["message", "message", "function_call"] or (
            [item.type for item in items] == ["message", "function_call", "function_call_output"]
        )
        assert (items[-1].call_id, items[-1].output) == (calls[0].call_id, "sunny")
        image: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,x"}]}]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="tiny", input=image)
        assert caught.value.param == "input[0].content[0]"

    serve(CALL, body)


def test_embeddings_are_of_length_one_and_the_same_in_both_encodings(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        packed = await client.embeddings.create(model="tiny", input=["The for", "A function"])
        plain = await client.embeddings.create(model="tiny", input=["The for", "A function"], encoding_format="float")
        for one, other in zip(packed.data, plain.data, strict=True):
            assert one.embedding == pytest.approx(other.embedding)
            assert sum(number**2 for number in one.embedding) == pytest.approx(1)
        short = await client.embeddings.create(model="tiny", input="The for", dimensions=8)
        assert len(short.data[0].embedding) == 8
        assert sum(number**2 for number in short.data[0].embedding) == pytest.approx(1)

    serve("", body)


def test_a_text_is_tokenized_and_joined_again(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        told: Any = await client.post("/tokenize", body={"model": "tiny", "prompt": "The for"}, cast_to=object)
        assert told["count"] == len(told["tokens"])
        again: Any = await client.post("/detokenize", body={"model": "tiny", "tokens": told["tokens"]}, cast_to=object)
        assert again["prompt"] == "The for"

    serve("", body)


# --- Open Responses: the cases of its compliance suite, against the types of its specification ---


def item(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


QUESTION = [item("user", "weather?")]
OPEN_RESPONSES: dict[str, tuple[dict[str, Any], str]] = {
    "a text": ({"input": [item("user", "Say hello.")]}, "message"),
    "a stream": ({"input": [item("user", "Count to five.")], "stream": True}, "message"),
    "a system prompt": ({"input": [item("system", "Be a pirate."), item("user", "Say hello.")]}, "message"),
    "a tool": ({"input": QUESTION, "tools": [{"type": "function", **WEATHER}]}, "function_call"),
    "a tool in a stream": ({"input": QUESTION, "tools": [{"type": "function", **WEATHER}], "stream": True}, "function_call"),
    "several turns": ({"input": [item("user", "I am Alice."), item("assistant", "Hello!"), item("user", "Who am I?")]}, "message"),
}  # fmt: skip
EVENTS = {
    "response.created": "ResponseCreatedStreamingEvent", "response.in_progress": "ResponseInProgressStreamingEvent",
    "response.completed": "ResponseCompletedStreamingEvent",
    "response.output_item.added": "ResponseOutputItemAddedStreamingEvent",
    "response.output_item.done": "ResponseOutputItemDoneStreamingEvent",
    "response.content_part.added": "ResponseContentPartAddedStreamingEvent",
    "response.content_part.done": "ResponseContentPartDoneStreamingEvent",
    "response.output_text.delta": "ResponseOutputTextDeltaStreamingEvent",
    "response.output_text.done": "ResponseOutputTextDoneStreamingEvent",
    "response.function_call_arguments.delta": "ResponseFunctionCallArgumentsDeltaStreamingEvent",
    "response.function_call_arguments.done": "ResponseFunctionCallArgumentsDoneStreamingEvent",
}  # fmt: skip
OF_A_CALL = {
    "response.output_item.added", "response.function_call_arguments.delta", "response.function_call_arguments.done",
    "response.output_item.done",
}  # fmt: skip


@pytest.mark.parametrize("case", OPEN_RESPONSES)
def test_a_response_is_one_of_open_responses(serve: Any, case: str) -> None:
    import openresponses_types as spec

    fields, kind = OPEN_RESPONSES[case]

    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        async with client.responses.with_streaming_response.create(model="tiny", **fields) as answer:
            text = await answer.text()
        if not fields.get("stream"):
            told = json.loads(text)
        else:
            blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in text.split("\n\n") if block]
            assert blocks.pop()["data"] == "[DONE]"
            events = [json.loads(block["data"]) for block in blocks]
            assert [block["event"] for block in blocks] == [event["type"] for event in events]
            for event in events:
                getattr(spec, EVENTS[event["type"]]).model_validate(event)
            if kind == "function_call":
                assert {event["type"] for event in events} >= OF_A_CALL
                assert "function_call" in [event["item"]["type"] for event in events if "item" in event]
            told = events[-1]["response"]
        spec.ResponseResource.model_validate(told)
        assert told["status"] == "completed" and kind in [entry["type"] for entry in told["output"]]

    serve(CALL if kind == "function_call" else "Hello there", body)


def test_an_image_is_the_case_of_open_responses_that_is_refused_in_words(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        parts = [
            {"type": "input_text", "text": "What is it?"},
            {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="},
        ]
        with pytest.raises(openai.BadRequestError, match="this model reads text only") as caught:
            await client.responses.create(model="tiny", input=[item("user", parts)])  # type: ignore[list-item]
        assert (caught.value.param, engine.generations) == ("input[0].content[1]", [])

    serve("", body)


def test_a_response_is_refused_by_the_names_of_its_own_parameters(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}
        for fields, param in (
            ({"max_output_tokens": 10**9}, "max_output_tokens"),
            ({"tools": [{"type": "function", **WEATHER}] * 2}, "tools[1].name"),
            ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
            (
                {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "strin"}}}},
                "text.format.schema",
            ),
            ({"input": [call]}, "input"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.post("/responses", body={"model": "tiny", "input": "x", **fields}, cast_to=object)
            assert caught.value.param == param

    serve("", body)


def test_what_was_said_first_is_left_out_of_what_is_too_long_where_that_may_be(serve: Any) -> None:
    said = [item("user", f"question {number} " + "word " * 60) for number in range(8)]
    asked: Any = [item("system", "Be brief."), *said, item("user", "The last one?")]

    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            await client.responses.create(model="tiny", input=asked)
        reply = await client.responses.create(model="tiny", input=asked, truncation="auto")
        assert reply.truncation == "auto"
        prompt = engine._loaded.tokenizer.decode(engine.generations[-1].prompt)
        assert "Be brief." in prompt and "The last one?" in prompt and "question 7" in prompt
        assert "question 0" not in prompt
        alone: Any = [*said, item("user", "word " * 2000)]
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            await client.responses.create(model="tiny", input=alone, truncation="auto")

    serve("Good day", body)


@dataclass
class Tokenized:
    """How many characters a tokenizer was given."""

    count: int = 0


@contextmanager
def counted_tokenization() -> Iterator[Tokenized]:
    told, encode = Tokenized(), prompt_length.encode

    def counted(tokenizer: Any, text: str, **options: Any) -> list[int]:
        told.count += len(text)
        return encode(tokenizer, text, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "encode", counted)
        patch.setattr(prompt_length, "encode", counted)
        yield told


def test_what_is_far_too_long_or_too_many_is_refused_before_it_is_tokenized(serve: Any) -> None:
    async def body(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
        asked: list[tuple[str, dict[str, Any], str]] = [
            ("/completions", {"prompt": "a b " * 50_000}, "prompt"),
            ("/completions", {"prompt": ["a"] * 20_000}, "prompt"),
            ("/completions", {"prompt": ["a"] * 20, "n": 2}, "prompt"),
            ("/completions", {"prompt": [5] * 50_000}, "prompt"),
            ("/chat/completions", {"messages": [{"role": "user", "content": "a b " * 50_000}]}, "messages"),
            ("/embeddings", {"input": ["a"] * 20_000}, "input"),
            ("/embeddings", {"input": "a b " * 50_000}, "input"),
        ]
        for route, fields, param in asked:
            num_tokenized = tokenized.count
            with pytest.raises(openai.BadRequestError, match=r"at most|context length") as caught:
                await client.post(route, body={"model": "tiny", **fields}, cast_to=object)
            assert caught.value.param == param
            assert tokenized.count - num_tokenized < 20_000  # characters
        assert engine.generations == []

    with counted_tokenization() as tokenized:
        serve("", body)
